"""The read queue: what is read from the store, in which order, on threads of its own.

The model's thread never does file I/O: it submits requests (all misses of a layer in one call) and
takes records as they arrive. Threads, some for each directory, read by priority, demand before
look-ahead before background, at most `depth` parts at once per directory. Records are cut into
parts so that the first of several misses arrives early, with the drive's whole bandwidth, and
computes while the next is read.

A thread that has read a part takes the next one itself, and checks what it has completed: a record
alone costs two wake-ups, that of its thread and that of who waits for it: 80 µs beyond the drive's
own time, where an event loop in between took 240 (1.8 MB, two cores).

Guarantees:
- every ticket ends: done, failed with a named cause, or dropped;
- a failed read is tried once more, a record whose checksum differs is read once more;
- a buffer is not touched after its ticket has ended;
- at most one read per expert is under way: a second request joins it.
Assumes: the buffer of a request stays alive and is read by nobody until its ticket has ended.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import NamedTuple

import xxhash

from tierrun.io.errors import CorruptError, ReadError, TierrunError
from tierrun.io.reader import Reader
from tierrun.io.store import ExpertKey, Store, record_name
from tierrun.io.tickets import Priority, QueueFigures, State, Ticket
from tierrun.io.timeline import READS, span

PART_BYTES = 2 << 20
"""Records are read in parts of this size: large enough for full bandwidth at the default depth."""

DEFAULT_DEPTH = 8
"""Parts in flight per directory."""

_CHECKING = 2
"""Threads per directory beyond its depth, so that the drive is kept busy while some check."""


class _Part(NamedTuple):
    """Some bytes of a record, from `offset` of it."""

    ticket: Ticket
    offset: int
    nbytes: int


class _Lane:
    """The queue of one directory: tickets by urgency, and parts that a thread is to read now."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, Ticket]] = []
        self.in_flight = 0
        self.issued: SimpleQueue[_Part | None] = SimpleQueue()


class ReadQueue:
    """Reads experts of `store` through `reader`, which it closes with itself."""

    def __init__(
        self,
        store: Store,
        reader: Reader,
        depth: int = DEFAULT_DEPTH,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._store, self._reader = store, reader
        self._depth, self._part_bytes = depth, part_bytes
        roots = [path.parent for path in store.shard_paths]
        self._lanes = {root: _Lane() for root in roots}
        self._lane_of_shard = [self._lanes[root] for root in roots]
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._live: dict[ExpertKey, Ticket] = {}
        self._verified: set[ExpertKey] = set()
        self._reading = 0
        self._since = 0.0
        self._counts = QueueFigures()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name="tierrun-io", daemon=True)
            for lane in self._lanes.values()
            for _ in range(depth + _CHECKING)
        ]
        for thread in self._threads:
            thread.start()

    # -- called from the model's thread ---------------------------------------------------------

    def submit(self, requests: Sequence[tuple[ExpertKey, memoryview, Priority]]) -> list[Ticket]:
        """Queue reads; as many as there is room for begin at once.

        A request for an expert that is queued or being read joins that read at the higher of both
        priorities: its ticket is returned, with the buffer of the first request.
        """
        if self._closed:
            raise RuntimeError("the read queue is closed")
        tickets: list[Ticket] = []
        fresh: list[Ticket] = []
        with self._lock:
            for key, into, priority in requests:
                ticket = self._live.get(key)
                if ticket is None or ticket.unwanted:
                    ticket = Ticket(key, into, priority)
                    self._live[key] = ticket
                    fresh.append(ticket)
                elif priority < ticket.priority:
                    ticket.priority = priority
                    fresh.append(ticket)
                tickets.append(ticket)
            self._enqueue(fresh)
        return tickets

    def demand(self, tickets: Sequence[Ticket]) -> None:
        """Raise reads that were look-ahead to demand: the model waits for them now.

        One that was being dropped is wanted again, unless it has ended already.
        """
        raised = []
        with self._lock:
            for ticket in tickets:
                if not ticket.ended and (ticket.unwanted or ticket.priority != Priority.DEMAND):
                    ticket.priority, ticket.unwanted = Priority.DEMAND, False
                    raised.append(ticket)
            self._enqueue(raised)

    def drop(self, tickets: Sequence[Ticket]) -> None:
        """Give up look-ahead reads whose layer has passed.

        Queued ones end as dropped now; those under way issue no further part and end as dropped
        with the last part in flight, or as done where all parts were issued already.
        """
        with self._lock:
            for ticket in tickets:
                if ticket.state is State.QUEUED:
                    self._end(ticket, State.DROPPED)
                elif ticket.state is State.READING:
                    ticket.unwanted = True
                    if ticket.parts_in_flight == 0 and not self._is_issued(ticket):
                        self._finish(ticket, State.DROPPED)  # others went before its next part

    def arrivals(self, tickets: Sequence[Ticket]) -> Iterator[Ticket]:
        """The tickets in the order in which they end; blocks while none has."""
        arrived: SimpleQueue[Ticket] = SimpleQueue()
        with self._lock:
            for ticket in tickets:
                if ticket.ended:
                    arrived.put(ticket)
                else:
                    ticket.listeners.append(arrived)
        for _ in tickets:
            yield arrived.get()

    @property
    def reader_name(self) -> str:
        return self._reader.name

    def figures(self) -> QueueFigures:
        """A snapshot of the counters."""
        with self._lock:
            self._account(0)
            return replace(self._counts)

    def close(self) -> None:
        """Drop what is queued, wait for what is in flight, end the threads, close the reader."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            live = list(self._live.values())
        self.drop(live)
        for _ in self.arrivals(live):
            pass
        for lane in self._lanes.values():
            for _ in range(self._depth + _CHECKING):
                lane.issued.put(None)
        for thread in self._threads:
            thread.join()
        self._reader.close()

    # -- what is read next, under the lock ------------------------------------------------------

    def _enqueue(self, tickets: Sequence[Ticket]) -> None:
        touched: dict[int, _Lane] = {}
        for ticket in tickets:
            record, _ = self._store.locate(ticket.key)
            lane = self._lane_of_shard[record.shard]
            heapq.heappush(lane.heap, (ticket.priority, next(self._order), ticket))
            touched[id(lane)] = lane
        for lane in touched.values():
            self._issue(lane)

    def _issue(self, lane: _Lane) -> None:
        """Wake a thread for every part that there is room for."""
        while (part := self._take(lane)) is not None:
            lane.issued.put(part)

    def _take(self, lane: _Lane) -> _Part | None:
        """A part of the most urgent ticket, in flight from now on; None if `depth` of them are."""
        while lane.heap and lane.in_flight < self._depth:
            ticket = lane.heap[0][2]
            if not self._begin(ticket):
                heapq.heappop(lane.heap)
                continue
            offset = ticket.next_part * self._part_bytes
            ticket.next_part += 1
            ticket.parts_in_flight += 1
            lane.in_flight += 1
            return _Part(ticket, offset, min(self._part_bytes, len(ticket.into) - offset))
        return None

    def _begin(self, ticket: Ticket) -> bool:
        """Whether `ticket` has another part to issue."""
        if ticket.ended or ticket.unwanted or ticket.error is not None:
            return False
        if ticket.state is State.QUEUED:
            ticket.state = State.READING
            self._account(+1)
        return not self._is_issued(ticket)

    def _is_issued(self, ticket: Ticket) -> bool:
        """Whether all its parts are in flight or read."""
        return ticket.next_part * self._part_bytes >= len(ticket.into)

    def _finish(self, ticket: Ticket, state: State) -> None:
        self._account(-1)
        if state is State.DONE:
            self._counts.records += 1
            self._counts.nbytes += len(ticket.into)
        self._end(ticket, state)

    def _end(self, ticket: Ticket, state: State) -> None:
        ticket.state = state
        self._counts.dropped += state is State.DROPPED
        if self._live.get(ticket.key) is ticket:
            del self._live[ticket.key]
        for listener in ticket.listeners:
            listener.put(ticket)
        ticket.listeners.clear()

    def _account(self, change: int) -> None:
        """Integrate the number of records in flight over time, then change it."""
        now = time.perf_counter()
        if self._reading:
            self._counts.busy_seconds += now - self._since
            self._counts.record_seconds += (now - self._since) * self._reading
        self._since = now
        self._reading += change

    # -- on the threads of a directory ----------------------------------------------------------

    def _work(self, lane: _Lane) -> None:
        part = lane.issued.get()
        while part is not None:
            error = self._read(part)
            part = self._read_is_over(lane, part.ticket, error) or lane.issued.get()

    def _read(self, part: _Part) -> TierrunError | None:
        ticket, offset, nbytes = part
        try:
            with span(READS, f"{ticket.key.layer}.{ticket.key.expert}"):
                self._read_twice(ticket, offset, nbytes)
        except Exception as error:
            return _named(ticket, error)
        return None

    def _read_is_over(
        self, lane: _Lane, ticket: Ticket, error: TierrunError | None
    ) -> _Part | None:
        """One part of `ticket` is read, or has failed; the part to read next, if there is any."""
        with self._lock:
            ticket.error = ticket.error or error
            ticket.parts_in_flight -= 1
            lane.in_flight -= 1
            if ticket.parts_in_flight:
                return self._take(lane)
            if ticket.error is not None:
                self._finish(ticket, State.FAILED)
                return self._take(lane)
            if not self._is_issued(ticket):
                if ticket.unwanted:
                    self._finish(ticket, State.DROPPED)
                return self._take(lane)
            if ticket.key in self._verified:
                self._finish(ticket, State.DONE)
                return self._take(lane)
            self._issue(lane)
        self._verify(ticket)
        return None

    def _read_twice(self, ticket: Ticket, offset: int, nbytes: int) -> None:
        record, extent = self._store.locate(ticket.key)
        into = ticket.into[offset : offset + nbytes]
        try:
            self._reader.read(record.shard, extent.offset + offset, into)
        except OSError:
            self._count_retry()
            try:
                self._reader.read(record.shard, extent.offset + offset, into)
            except OSError as error:
                path = str(self._store.shard_paths[record.shard])
                reason = error.strerror or str(error)
                raise ReadError(path, *ticket.key, error.errno or 0, reason) from error

    def _verify(self, ticket: Ticket) -> None:
        """End a ticket whose record has not been read before: compare its checksum, and read it
        once more if that differs."""
        try:
            if not self._matches(ticket):
                self._count_retry()
                self._read_twice(ticket, 0, len(ticket.into))
                if not self._matches(ticket):
                    raise self._corrupt(ticket)
        except Exception as error:
            ticket.error = _named(ticket, error)
        with self._lock:
            if ticket.error is None:
                self._verified.add(ticket.key)
            self._finish(ticket, State.FAILED if ticket.error else State.DONE)

    def _matches(self, ticket: Ticket) -> bool:
        record, _ = self._store.locate(ticket.key)
        return xxhash.xxh3_64_intdigest(ticket.into) == record.checksum

    def _corrupt(self, ticket: Ticket) -> CorruptError:
        record, _ = self._store.locate(ticket.key)
        return CorruptError(
            f"{self._store.shard_paths[record.shard]}: layer {ticket.key.layer}, expert "
            f"{ticket.key.expert} differs from its checksum (read twice); convert the model again"
        )

    def _count_retry(self) -> None:
        with self._lock:
            self._counts.retries += 1


def _named(ticket: Ticket, error: Exception) -> TierrunError:
    """`error` as one of ours: a bug below must fail the read, not hang the model."""
    if isinstance(error, TierrunError):
        return error
    return TierrunError(f"{record_name(ticket.key)}: {error!r}")
