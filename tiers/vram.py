"""The hot tier in VRAM: a cache of the warm tier, filled before the kernels that read it.

Of what a layer wants, the device finds by itself what is here, and what it can read in RAM (the
slot table); the host sees to the rest: `fetch` for decode, `stream` for prefill. Both yield lists
of (expert, offset) as soon as the copies are *enqueued*; the caller then calls `copies.ready()` and
launches kernels on them. What is computed where it lies, in RAM, by the device over its bus or by
the CPU, is not copied for that: it comes up later, beside everything else, if it is worth a slot.

Guarantees:
- a kernel launched after `copies.ready()` sees the store's bytes at every offset yielded;
- a lookup launched after a fetch or stream has ended, or after `publish`, finds in `table` exactly
  what is here, and what RAM holds as `InRam` says;
- no slot is overwritten while a kernel or a copy may read it: the slots of a call are leased until
  copies are held back behind its kernels, or the call is over;
- whatever prefill copies, it takes nothing that decode has proven.
Assumes:
- the host asks for a layer's experts only after it has read what that layer's router chose, so
  that every kernel of earlier calls has ended, and every kernel of this layer that reads what the
  device found by itself has been launched; those of them that read in RAM have ended too, or their
  experts are among those asked for, and no more than the layer's top-k;
- before it asks for the next experts of a call it has launched the kernels that read the last;
- one fetch or stream at a time, and no lookup before it has ended: one that was given up half-way,
  and that an exception's traceback may keep alive, ends with `abandon` or `next_step`.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.io.store import ExpertKey
from tierrun.tiers.copies import Copies
from tierrun.tiers.past import Past
from tierrun.tiers.promotions import Promotions
from tierrun.tiers.residency import Held, Residency
from tierrun.tiers.slottable import InRam, SlotTable
from tierrun.tiers.straight import StraightReads
from tierrun.tiers.tier import NOBODY, Tier
from tierrun.tiers.transfers import Transfers
from tierrun.tiers.vramcall import VramCall
from tierrun.tiers.vramchunks import VramChunks
from tierrun.tiers.vramslots import VramSlots

_MOST_GROUP = 16
"""Experts per group of a prefill: enough for large copies and few launches."""

_MOST_TOGETHER = 8
"""Of them, those whose copies are enqueued and waited for together: that costs 40 µs."""


class Arrival(NamedTuple):
    """An expert, and where its record begins, in bytes from `VramTier.base`."""

    expert: int
    offset: int


class Brought(NamedTuple):
    """Experts to compute now: on the device, and where they lie in RAM (leased until the next)."""

    arrived: list[Arrival]
    held: list[Held]


Choose = Callable[[list[Held]], int]
"""Of experts in RAM, those worth most first: how many to copy, the others being computed there."""


class VramTier:
    """What the engine asks for experts on a device.

    `tier` holds its slots, in a slab on the device; `residency` everything below it, with no hot
    tier of its own. `window` is how many reads run ahead of a prefill. With `straight`, what a
    prompt wants and the warm tier would not keep is read with that. `in_ram` is what lookups find
    of experts in RAM only; whoever has them found there computes them there.
    """

    def __init__(
        self,
        residency: Residency,
        tier: Tier,
        copies: Copies,
        window: int = 1,
        in_ram: InRam = InRam.HIDDEN,
    ) -> None:
        placement = residency.placement
        assert placement.hot.num_slots == 0, "two hot tiers"
        self.residency, self.copies = residency, copies
        self._placement, self._tier, self._window = placement, tier, window
        base = tier.slab.base
        self._table = SlotTable(
            int(placement.first[-1]), base.data_ptr(), pinned=base.is_cuda, in_ram=in_ram
        )
        assert not placement.homes, "experts in RAM before the table"
        placement.watcher = self._table
        self.in_ram = in_ram
        self.slots = VramSlots(placement, tier, self._table)
        placement.backed = self.slots.proven_experts
        self.ledger = placement.ledger
        self._counters = self.ledger.counters
        self._transfers = Transfers(placement, self.slots, copies, placement.ledger)
        self._promotions = Promotions(placement, self.slots, self._transfers)
        self._call: VramCall | None = None
        self._ahead: set[int] = set()
        """Experts that were copied ahead for the next stream."""
        self.chunks = VramChunks(placement, self.slots)
        self.straight: StraightReads | None = None

    @property
    def base(self) -> torch.Tensor:
        """uint8; the address that offsets count from. It stays the same but for `grow`."""
        return self._tier.slab.base

    @property
    def table(self) -> torch.Tensor:
        """int64 over all experts: see `SlotTable`. Never reallocated."""
        return self._table.tensor

    @property
    def num_copies(self) -> int:
        """Batches of copies in the books, over or under way."""
        return self._transfers.num_copies

    def table_of(self, layer: int) -> torch.Tensor:
        """The part of `table` for the experts of one layer."""
        first = self._placement.first
        return self.table[int(first[layer]) : int(first[layer + 1])]

    @property
    def addresses(self) -> NDArray[np.int64]:
        """Over all experts: where in RAM each record is, 0 if it is not there (or not yet)."""
        return self._table.addresses

    @property
    def nbytes(self) -> int:
        """VRAM taken now."""
        return self._tier.slab.nbytes

    # -- the clock and the policy ---------------------------------------------------------------

    def next_step(self) -> None:
        """See `Residency.next_step`; a call that was given up ends here, before any lookup."""
        self.abandon()
        self.residency.next_step()
        if self._table.has_changed:  # a prompt that was broken off has copied ahead
            self.publish()

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """See `Residency.used`."""
        self.residency.used(layer, experts)

    def served(self, chosen: NDArray[np.int64]) -> None:
        """Account for layers that needed no `fetch`: experts chosen, numbered over all layers.

        All of these were found in VRAM, or in RAM and computed there; they may be named several
        times. What is worth a slot starts to come up, also of what `fetch` has brought and left in
        RAM: not then, as a layer waits. To be called with no lookup, fetch or stream
        under way.
        """
        experts = np.unique(chosen)
        self._placement.policy.used(experts, self._placement.step)
        slots = self.slots.slot_of[experts]
        here = slots != NOBODY
        in_ram = experts[~here]
        self._counters.hot += len(experts) - len(in_ram)
        self._counters.warm += len(in_ram)
        unproven = slots[here & ~self._tier.proven[slots]]
        if len(unproven):
            self._transfers.admit(unproven.tolist())
        self._promotions.land()
        self._promotions.start(in_ram)
        self.publish()

    @property
    def is_owed(self) -> bool:
        """Whether `served` has something to do even if nothing was chosen since."""
        return self._promotions.are_noted

    def publish(self) -> None:
        """Let lookups that are launched from now on see everything that has come and gone."""
        self.copies.ready()
        self._table.flush()

    # -- decode ---------------------------------------------------------------------------------

    def fetch(
        self, layer: int, experts: Sequence[int], choose: Choose | None = None
    ) -> Iterator[Brought]:
        """Bring those of the distinct `experts` of `layer` that are not here, as they come.

        Those of the warm tier come first, together, then the others as their reads end. More than
        the layer's top-k (of several tokens) are fetched in groups of so many. All are copied, or
        as many as `choose` says.

        Raises:
            ReadError, CorruptError: the read of one failed; those yielded before are here.
        """
        call = self._begin(layer)
        try:
            hits, missing = self._split(layer, experts)
            self.residency.used(layer, list(hits))
            call.lease(hits.values())
            landed = self._land(call, missing)
            if landed:
                self.residency.used(layer, [expert for expert, _ in landed])
                yield Brought(landed, [])
            for group in _groups(missing, self._placement.top_k[layer]):
                yield from self._fetch_group(call, group, choose)
            self._transfers.admit(list(hits.values()))
        finally:
            self._end(call)

    def _fetch_group(
        self, call: VramCall, experts: list[int], choose: Choose | None
    ) -> Iterator[Brought]:
        self._make_idle()
        lease = self.residency.lease(call.layer, experts)
        call.hold(lease.release)
        warm, newcomers, computed = list(lease.ready), list[int](), list[Held]()
        if warm:
            yield self._bring(call, warm, choose, newcomers, computed)
        for held in lease.arrivals():
            yield self._bring(call, [held], choose, newcomers, computed)
        self._promotions.note([self._placement.index(call.layer, held.expert) for held in computed])
        call.let_go()
        self._transfers.admit(newcomers)

    def _bring(
        self,
        call: VramCall,
        held: list[Held],
        choose: Choose | None,
        newcomers: list[int],
        computed: list[Held],
    ) -> Brought:
        count = len(held)
        if choose is not None:
            held = self._worth_most_first(call.layer, held)
            count = choose(held)
        copied, computed[len(computed) :] = held[:count], held[count:]
        if not copied:
            return Brought([], held)
        self._make_room(call, count)
        slots = self._copy_up(call, copied)
        newcomers += slots
        return Brought(self._arrivals([one.expert for one in copied], slots), held[count:])

    def _worth_most_first(self, layer: int, held: list[Held]) -> list[Held]:
        if len(held) < 2:
            return held
        indices = self._placement.indices(layer, [one.expert for one in held])
        worth = self._placement.policy.worth(indices, self._placement.step)
        return [held[place] for place in np.argsort(-worth, kind="stable").tolist()]

    def _land(self, call: VramCall, missing: list[int]) -> list[Arrival]:
        """Those of `missing` that are coming up already, here now; they are taken out of it."""
        coming = self._promotions.coming
        if not coming:
            return []
        index = self._placement.index
        landed = [expert for expert in missing if index(call.layer, expert) in coming]
        if landed:
            self._promotions.land(wait=True)
            missing[:] = [expert for expert in missing if expert not in landed]
            self._counters.warm += len(landed)
        slots = self.slots.slot_of[self._placement.indices(call.layer, landed)].tolist()
        call.lease(slots)
        return self._arrivals(landed, slots)

    # -- prefill --------------------------------------------------------------------------------

    def stream(
        self, layer: int, experts: Sequence[int], group: int | None = None
    ) -> Iterator[list[Arrival]]:
        """Each of the distinct `experts` of `layer` once, in lists.

        First all that are here, then the others in groups (of at most `group`), which are copied
        while the group before is computed. They pass through unproven slots; free ones are filled
        and kept, up to the layer's share of them.

        Raises:
            ReadError, CorruptError: as `fetch`.
        """
        yield from self._stream(layer, experts, group or _MOST_GROUP, self._share(layer))

    def _stream(
        self, layer: int, experts: Sequence[int], group: int, share: int
    ) -> Iterator[list[Arrival]]:
        call = self._begin(layer)
        try:
            hits, missing = self._split(layer, experts)
            call.lease(hits.values())
            if hits:
                yield self._arrivals(list(hits), list(hits.values()))
                call.launched()
            landed = self._land(call, missing)
            if landed:
                yield landed
            if missing:
                yield from self._stream_missing(call, missing, group, share)
        finally:
            self._end(call)

    def _stream_missing(
        self, call: VramCall, missing: list[int], group: int, share: int
    ) -> Iterator[list[Arrival]]:
        # Two groups at a time, one being copied while the other is computed.
        group = max(1, min(group, self.slots.reserve[call.record_class] // 2))
        through, past = self._parted(call.layer, missing)
        if through:
            yield from self._stream_through(call, through, group, share)
        if past:
            yield from self._stream_past(call, past, group)

    def _parted(self, layer: int, missing: list[int]) -> tuple[list[int], list[int]]:
        """Those that come through the warm tier: it has them, or will keep them; and the others."""
        if self.straight is None:
            return missing, []
        room, through, past = self.residency.share(layer), list[int](), list[int]()
        for expert in missing:
            known = self._placement.home(layer, expert) is not None
            (through if known or room > 0 else past).append(expert)
            room -= not known
        return through, past

    def _stream_past(
        self, call: VramCall, experts: list[int], group: int
    ) -> Iterator[list[Arrival]]:
        """Groups read straight into VRAM, one ahead of the compute."""
        assert self.straight is not None
        past, share = Past(self.straight, self._tier, call.layer), self._share(call.layer)
        call.hold(past.stop)
        batches = deque(_groups(experts, group))
        while batches or len(past):
            if batches:
                self._begin_past(call, past, batches.popleft())
            if len(past) > bool(batches):
                found, slots, _ = past.next()
                for slot in slots:
                    self.slots.publish(slot)
                call.lease(slots)
                for slot in slots:
                    share -= self._keep(slot, share)
                self._counters.cold += len(found)
                self._counters.read_bytes += sum(self._tier.memory(s).numel() for s in slots)
                yield self._arrivals(found, slots)
                call.launched()
        call.let_go()

    def _begin_past(self, call: VramCall, past: Past, experts: list[int]) -> None:
        self._make_room(call, len(experts))
        index = self._placement.index
        slots = [
            self.slots.take(call.record_class, index(call.layer, expert)) for expert in experts
        ]
        self.copies.synchronize()  # what was in the slots may be read until now
        past.begin(experts, slots)

    def _stream_through(
        self, call: VramCall, missing: list[int], group: int, share: int
    ) -> Iterator[list[Arrival]]:
        window = self._window_for(call.record_class, group)
        source = self.residency.stream(call.layer, missing, window)
        call.hold(cast(Generator[Held, None, None], source).close)
        together = max(1, min(_MOST_TOGETHER, window // 4))
        for batch in _groups(missing, group):
            self._make_room(call, len(batch))
            arrived = list[Arrival]()
            for part in _groups(batch, together):
                experts, slots = self._copy_next(call, source, len(part), window)
                arrived += self._arrivals(experts, slots)
                for slot in slots:
                    share -= self._keep(slot, share)
            yield arrived
            call.launched()
        call.let_go()

    def _copy_next(
        self, call: VramCall, source: Iterator[Held], count: int, window: int
    ) -> tuple[list[int], list[int]]:
        """Copy the next `count` of `source` up together; these experts, and their slots."""
        held, leases = list[Held](), self._placement.warm.leases
        try:
            for _ in range(count):
                self._transfers.reap(window - 1 - len(held))  # what is held, no read can reuse
                held.append(next(source))
                leases[held[-1].slot] += 1  # `source` gives it back at the next
            return [one.expert for one in held], self._copy_up(call, held)
        finally:
            for one in held:
                leases[one.slot] -= 1

    def copy_ahead(self, layer: int, experts: Sequence[int]) -> None:
        """Start copies of those of `experts` that RAM has: a prompt is likely to want them next.

        As many, the first ones, as pass through slots that hold nothing proven, once the kernels
        that were launched have ended. To be called between two streams; before a lookup comes
        `next_step`.
        """
        placement, record_class = self._placement, self._placement.class_of_layer[layer]
        room, found = self.slots.num_passing(record_class), list[Held]()
        coming = self._promotions.coming
        for expert in experts:
            index = placement.index(layer, expert)
            home = placement.homes.get(index)
            absent = self.slots.slot_of[index] == NOBODY and index not in coming
            if absent and home is not None and home.ticket is None and len(found) < room:
                found.append(Held(expert, *home))
        if not found:
            return
        self.copies.computed()()
        made = self.slots.make_room(record_class, len(found))
        assert made, "something is leased between two streams"
        self._ahead = {placement.index(layer, one.expert) for one in found}
        self._enqueue_up(layer, found)

    def _keep(self, slot: int, share: int) -> bool:
        """Prove a slot that was free, while the layer's share and the reserve allow it."""
        kept = share > 0 and self.slots.slack(int(self._tier.record_class[slot])) > 0
        if kept:
            self.slots.prove(slot)
        return kept

    def _share(self, layer: int) -> int:
        """How many more experts of `layer` a prefill may keep: its part of the class's slots."""
        placement = self._placement
        record_class = placement.class_of_layer[layer]
        sizes = np.diff(placement.first)
        peers = np.array(placement.class_of_layer) == record_class
        first, last = placement.first[layer], placement.first[layer + 1]
        kept = int(self.slots.proven_experts[first:last].sum())
        slots = self._tier.num_slots_of(record_class)
        return int(slots * sizes[layer] // sizes[peers].sum()) - kept

    def _window_for(self, record_class: int, group: int) -> int:
        """Reads ahead: two groups at least, so that as many copies can be under way."""
        most = self._placement.warm.num_slots_of(record_class) // 2
        return max(1, min(max(self._window, 2 * group + 1), most))

    # -- both -----------------------------------------------------------------------------------

    def _begin(self, layer: int) -> VramCall:
        self.abandon()
        self._make_idle()
        self._call = VramCall(layer, self._placement.class_of_layer[layer], self._tier, self.copies)
        return self._call

    def _end(self, call: VramCall) -> None:
        """The call is over, or given up: publish what has come and what has gone."""
        call.close()
        if self._call is not call:
            return
        self._call = None
        self._ahead.clear()
        self.slots.sweep()
        self._promotions.land()
        self.publish()

    def _make_idle(self) -> None:
        """No warm slot is held but by deferred promotions, none is being filled by a copy."""
        self._transfers.settle()
        self._transfers.reap()

    def _make_quiet(self) -> None:
        """No copy is under way at all, and the table says what has come."""
        self._promotions.land(wait=True)
        self._make_idle()
        self._table.flush()

    def _split(self, layer: int, experts: Sequence[int]) -> tuple[dict[int, int], list[int]]:
        """Those that are here, with their slots, which are counted; and those that are not."""
        slots = self.slots.slot_of[self._placement.indices(layer, experts)].tolist()
        hits = {e: slot for e, slot in zip(experts, slots, strict=True) if slot != NOBODY}
        missing = [e for e in experts if e not in hits]
        ahead = len(self._ahead.intersection(self._placement.indices(layer, list(hits)).tolist()))
        self._counters.warm += ahead
        self._counters.hot += len(hits) - ahead
        return hits, missing

    def _make_room(self, call: VramCall, count: int) -> None:
        """Free `count` slots. The table goes on naming whom they held until the call is over:
        nobody looks anything up before."""
        while not self.slots.make_room(call.record_class, count):
            if call.recycle() or self._transfers.settle():
                continue
            assert self._transfers.deferred, "the reserve of slots is leased"
            self._promotions.land(wait=True)

    def _copy_up(self, call: VramCall, held: list[Held]) -> list[int]:
        """Enqueue copies into slots for which room has been made, and publish them."""
        slots = self._enqueue_up(call.layer, held)
        call.lease(slots)
        return slots

    def _enqueue_up(self, layer: int, held: list[Held]) -> list[int]:
        index, record_class = self._placement.index, self._placement.class_of_layer[layer]
        slots = [self.slots.take(record_class, index(layer, one.expert)) for one in held]
        self._transfers.promote([(one.slot, slot) for one, slot in zip(held, slots, strict=True)])
        for slot in slots:
            self.slots.publish(slot)
        return slots

    def _arrivals(self, experts: list[int], slots: list[int]) -> list[Arrival]:
        places = map(self.slots.offset, slots)
        return [Arrival(*pair) for pair in zip(experts, places, strict=True)]

    # -- beside them ----------------------------------------------------------------------------

    def warm_up(self, order: Iterable[ExpertKey]) -> None:
        """Fill VRAM with the first of `order` that it can hold; nothing counts as a lookup.

        Raises:
            ReadError, CorruptError: a read failed.
        """
        classes = self._placement.class_of_layer
        room = [self._tier.num_free(record_class) for record_class in range(max(classes) + 1)]
        chosen: defaultdict[int, list[int]] = defaultdict(list)
        for layer, expert in order:
            absent = self.slots.slot_of[self._placement.first[layer] + expert] == NOBODY
            if absent and room[classes[layer]] > 0:
                room[classes[layer]] -= 1
                chosen[layer].append(expert)
        counters = self._counters
        before = counters.hot, counters.warm, counters.cold
        for layer, experts in sorted(chosen.items()):
            for _ in self._stream(layer, experts, _MOST_GROUP, len(experts)):
                pass
        counters.hot, counters.warm, counters.cold = before

    def shrink(self, nbytes: int) -> int:
        """Give at least `nbytes` back to the device if that can be; the bytes that were given.

        What is worth least goes, in chunks of the slab, as long as every layer can still run. Ends
        a call under way; waits for the device.
        """
        self._stop()
        given = 0
        while given < nbytes and (dropped := self.chunks.drop_least()):
            given += dropped
        self.copies.ready()
        if given and self.base.is_cuda:
            torch.cuda.empty_cache()
        return given

    def grow(self, nbytes: int) -> int:
        """Take back chunks that were given, of at most `nbytes`; the bytes that were taken.

        They come without experts. `base` may move, and every offset with it: who has recorded
        `base` must record anew. Ends a call under way; waits for the device.
        """
        self._stop()
        taken = self.chunks.restore(nbytes)
        self.copies.ready()
        return taken

    def _stop(self) -> None:
        """Nothing is under way any more, on the host or on the device."""
        self.abandon()
        self._make_quiet()
        self.copies.synchronize()

    def abandon(self) -> None:
        """End a fetch or stream that was given up; reads under way go on and are kept."""
        if self._call is not None:
            self._end(self._call)

    def close(self) -> None:
        """Wait for every copy; nothing may be asked for afterwards."""
        self._stop()

    def records(self) -> Iterator[tuple[ExpertKey, torch.Tensor]]:
        """Every expert that is here, and its bytes on the device. Between calls only."""
        self.copies.synchronize()
        first = self._placement.first
        for layer, start in enumerate(first[:-1].tolist()):
            for expert, slot in enumerate(self.slots.slot_of[start : first[layer + 1]].tolist()):
                if slot != NOBODY:
                    yield ExpertKey(layer, expert), self._tier.memory(slot)

    def check_integrity(self) -> None:
        """This tier's and the residency's books agree, also with the table on the device.

        Between calls only: nothing is leased then. Waits for the device.
        """
        assert self._call is None, "a fetch or stream is under way"
        self._make_quiet()
        self.copies.synchronize()
        assert not self._tier.leases.any(), "leased between calls"
        self.slots.check_integrity()
        self.residency.check_integrity()


def _groups(experts: list[int], most: int) -> Iterator[list[int]]:
    for first in range(0, len(experts), most):
        yield experts[first : first + most]
