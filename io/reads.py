"""The read queue: what is read from the store, in which order, on a thread of its own.

The model's thread never does file I/O: it submits requests (all misses of a layer in one call) and
takes records as they arrive. An asyncio loop (uvloop where there is one) on the I/O thread
issues them by priority, demand before look-ahead before background, at most `depth` parts at once
per directory. Records are cut into parts so that the first of several misses arrives early, with
the drive's whole bandwidth, and computes while the next is read.

Guarantees:
- every ticket ends: done, failed with a named cause, or dropped;
- a failed read is tried once more, a record whose checksum differs is read once more;
- a buffer is not touched after its ticket has ended;
- at most one read per expert is under way: a second request joins it.
Assumes: the buffer of a request stays alive and is read by nobody until its ticket has ended.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

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


class _Lane:
    """The queue of one directory."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, Ticket]] = []
        self.in_flight = 0


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
        lanes = {root: _Lane() for root in roots}
        self._lane_of_shard = [lanes[root] for root in roots]
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._live: dict[ExpertKey, Ticket] = {}
        self._verified: set[ExpertKey] = set()
        self._reading = 0
        self._since = 0.0
        self._counts = QueueFigures()
        self._hashers = ThreadPoolExecutor(2, thread_name_prefix="tierrun-hash")
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = _new_loop()
        self._closed = False
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="tierrun-io", daemon=True
        )
        self._thread.start()

    # -- called from the model's thread ---------------------------------------------------------

    def submit(self, requests: Sequence[tuple[ExpertKey, memoryview, Priority]]) -> list[Ticket]:
        """Queue reads; one wake-up of the I/O thread for all of them.

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
        if fresh:
            self._loop.call_soon_threadsafe(self._enqueue, fresh)
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
        if raised:
            self._loop.call_soon_threadsafe(self._enqueue, raised)

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
        """Drop what is queued, wait for what is in flight, stop the thread, close the reader."""
        if self._closed:
            return
        self._closed = True
        with self._lock:
            live = list(self._live.values())
        self.drop(live)
        for _ in self.arrivals(live):
            pass
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._hashers.shutdown()

    # -- on the I/O thread ----------------------------------------------------------------------

    def _enqueue(self, tickets: list[Ticket]) -> None:
        touched: dict[int, _Lane] = {}
        for ticket in tickets:
            record, _ = self._store.locate(ticket.key)
            lane = self._lane_of_shard[record.shard]
            heapq.heappush(lane.heap, (ticket.priority, next(self._order), ticket))
            touched[id(lane)] = lane
        for lane in touched.values():
            self._pump(lane)

    def _pump(self, lane: _Lane) -> None:
        """Issue parts of the most urgent tickets until `depth` parts are in flight."""
        while lane.heap and lane.in_flight < self._depth:
            ticket = lane.heap[0][2]
            if not self._begin(ticket):
                heapq.heappop(lane.heap)
                if ticket.parts_in_flight == 0:
                    self._spawn(self._settle(ticket))
                continue
            offset = ticket.next_part * self._part_bytes
            ticket.next_part += 1
            ticket.parts_in_flight += 1
            lane.in_flight += 1
            self._spawn(self._read_part(lane, ticket, offset))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work`; the loop itself keeps only a weak reference to its tasks."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _begin(self, ticket: Ticket) -> bool:
        """Whether `ticket` has another part to issue."""
        with self._lock:
            if ticket.ended or ticket.unwanted or ticket.error is not None:
                return False
            if ticket.state is State.QUEUED:
                ticket.state = State.READING
                self._account(+1)
            return ticket.next_part * self._part_bytes < len(ticket.into)

    async def _read_part(self, lane: _Lane, ticket: Ticket, offset: int) -> None:
        try:
            nbytes = min(self._part_bytes, len(ticket.into) - offset)
            with span(READS, f"{ticket.key.layer}.{ticket.key.expert}"):
                await self._read_twice(ticket, offset, nbytes)
        except Exception as error:
            ticket.error = ticket.error or _named(ticket, error)
        lane.in_flight -= 1
        ticket.parts_in_flight -= 1
        self._pump(lane)
        if ticket.parts_in_flight == 0:
            await self._settle(ticket)

    async def _read_twice(self, ticket: Ticket, offset: int, nbytes: int) -> None:
        record, extent = self._store.locate(ticket.key)
        into = ticket.into[offset : offset + nbytes]
        try:
            await self._reader.read(record.shard, extent.offset + offset, into)
        except OSError:
            self._counts.retries += 1
            try:
                await self._reader.read(record.shard, extent.offset + offset, into)
            except OSError as error:
                path = str(self._store.shard_paths[record.shard])
                reason = error.strerror or str(error)
                raise ReadError(path, *ticket.key, error.errno or 0, reason) from error

    async def _settle(self, ticket: Ticket) -> None:
        """End a ticket that has no part in flight, if it has none left to issue."""
        if ticket.ended or ticket.settling:
            return
        ticket.settling = True
        if ticket.error is None and ticket.next_part * self._part_bytes >= len(ticket.into):
            await self._verify(ticket)
            self._finish(ticket, State.FAILED if ticket.error else State.DONE)
        elif ticket.error is not None:
            self._finish(ticket, State.FAILED)
        else:
            self._drop_unwanted(ticket)
            ticket.settling = False

    async def _verify(self, ticket: Ticket) -> None:
        """Compare the checksum at the first read of each record; read once more if it differs."""
        if ticket.key in self._verified:
            return
        try:
            if not await self._matches(ticket):
                self._counts.retries += 1
                await self._read_twice(ticket, 0, len(ticket.into))
                if not await self._matches(ticket):
                    raise self._corrupt(ticket)
            self._verified.add(ticket.key)
        except Exception as error:
            ticket.error = _named(ticket, error)

    async def _matches(self, ticket: Ticket) -> bool:
        record, _ = self._store.locate(ticket.key)
        digest = xxhash.xxh3_64_intdigest
        if self._reading > 1:
            found = await self._loop.run_in_executor(self._hashers, digest, ticket.into)
        else:  # nothing else to do here: another thread would only have to wake up
            found = digest(ticket.into)
        return found == record.checksum

    def _corrupt(self, ticket: Ticket) -> CorruptError:
        record, _ = self._store.locate(ticket.key)
        return CorruptError(
            f"{self._store.shard_paths[record.shard]}: layer {ticket.key.layer}, expert "
            f"{ticket.key.expert} differs from its checksum (read twice); convert the model again"
        )

    async def _shut_down(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._reader.close()

    # -- shared state, under the lock -----------------------------------------------------------

    def _finish(self, ticket: Ticket, state: State) -> None:
        with self._lock:
            self._account(-1)
            if state is State.DONE:
                self._counts.records += 1
                self._counts.nbytes += len(ticket.into)
            self._end(ticket, state)

    def _drop_unwanted(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.unwanted:
                self._account(-1)
                self._end(ticket, State.DROPPED)

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


def _named(ticket: Ticket, error: Exception) -> TierrunError:
    """`error` as one of ours: a bug below must fail the read, not hang the model."""
    if isinstance(error, TierrunError):
        return error
    return TierrunError(f"{record_name(ticket.key)}: {error!r}")


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # no uvloop on this platform; asyncio's own loop does the same, slower
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
