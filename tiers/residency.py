"""Residency: how a layer gets the experts it wants.

Decode *leases* a few experts: those in a tier are there at once, the others are demanded in one
submission and arrive as their reads end. Prefill *streams* all experts of a layer, each once.
Look-ahead reads what the next layer is expected to want, behind every demand.

Guarantees:
- a leased slot is never evicted or overwritten, a filling slot never read;
- a lease gets every expert or raises the read's named error, and is released either way;
- nothing is allocated: bytes only move between slots.
Assumes: one lease or stream at a time, of at most `top_k` experts for a lease, and a landing
tier of at least `top_k` + 1 slots of each class (`tierrun.tiers.budget` refuses less).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierrun.io.store import ExpertKey
from tierrun.io.tickets import Priority, State, Ticket
from tierrun.tiers.placement import Home, Placement
from tierrun.tiers.tier import Tier

_PROMOTIONS_PER_LAYER = 2
"""Copies into the hot tier after one layer; more cost more than they bring (llama.cpp#27861)."""


class Held(NamedTuple):
    """A leased expert, ready to be computed on."""

    expert: int
    tier: Tier
    slot: int


class Residency:
    """What the engine asks for experts."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._ahead: list[set[int]] = [set() for _ in placement.class_of_layer]

    def next_step(self) -> None:
        """A new token: the clock of the replacement policy."""
        self.placement.step += 1

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Tell the policy that `experts` were chosen at this step."""
        placement = self.placement
        placement.policy.used(placement.indices(layer, experts), placement.step)

    def expects(self, layer: int) -> bool:
        """Whether something was read ahead for `layer`, so that a lease must account for it."""
        return bool(self._ahead[layer])

    def served(self, experts: NDArray[np.int64]) -> None:
        """Distinct `experts`, numbered over all layers, were used at this step where they lay,
        without a lease; only where nothing is ever promoted. Some may have made way since for what
        was read ahead."""
        placement = self.placement
        tier, count = placement.landing, len(experts)
        placement.policy.used(experts, placement.step)
        homes = map(placement.homes.get, experts.tolist())
        tier.proven[[home.slot for home in homes if home is not None]] = True
        if tier is placement.hot:
            placement.ledger.counters.hot += count
        else:
            placement.ledger.counters.warm += count

    # -- decode ---------------------------------------------------------------------------------

    def lease(self, layer: int, experts: Sequence[int]) -> "Lease":
        """Lease the distinct `experts` of `layer`; reads of the missing ones start now."""
        self.placement.harvest()
        lease = Lease(self, layer)
        try:
            missing = [expert for expert in experts if not self._join(lease, expert)]
            self._layer_passed(layer, experts)
            self._demand(lease, missing)
            self.used(layer, experts)
        except BaseException:
            lease.release()
            raise
        return lease

    def _join(self, lease: "Lease", expert: int) -> bool:
        """Lease `expert` if it is in a tier or on its way there."""
        home = self.placement.home(lease.layer, expert)
        if home is None:
            return False
        ticket = home.ticket
        if ticket is not None:
            self.placement.queue.demand([ticket])
            if ticket.state in (State.DROPPED, State.FAILED):
                self.placement.settle(home.slot)
                return False
        self._count(lease.layer, expert, home, ticket)
        home.tier.proven[home.slot] = True
        lease.add(Held(expert, *home), ticket)
        return True

    def _count(self, layer: int, expert: int, home: Home, ticket: Ticket | None) -> None:
        counters = self.placement.ledger.counters
        ahead = expert in self._ahead[layer]
        if ticket is not None or ahead:
            counters.cold += 1
            counters.ahead_late += ahead and ticket is not None
            counters.ahead_useful += ahead and ticket is None
        elif home.tier is self.placement.hot:
            counters.hot += 1
        else:
            counters.warm += 1

    def _demand(self, lease: "Lease", experts: Sequence[int]) -> None:
        pairs: list[tuple[int, int]] = []
        try:
            for expert in experts:
                pairs.append((expert, self._slot_for(ExpertKey(lease.layer, expert))))
            tickets = self.placement.read(lease.layer, pairs, Priority.DEMAND)
        except BaseException:  # Ctrl-C while waiting for a slot: no read will ever fill these
            self.placement.abandon(lease.layer, [expert for expert, _ in pairs])
            raise
        for (expert, slot), ticket in zip(pairs, tickets, strict=True):
            lease.add(Held(expert, self.placement.landing, slot), ticket)
        self.placement.ledger.counters.cold += len(experts)

    def _slot_for(self, key: ExpertKey) -> int:
        """A slot for a demanded expert; reads that nobody waits for give way if they hold all."""
        placement = self.placement
        while (slot := placement.take_or_evict(key, proven=True)) is None:
            made = placement.make_way(placement.class_of_layer[key.layer])
            assert made, f"no slot for {key}: more experts are leased than the budget allows"
        return slot

    # -- look-ahead -----------------------------------------------------------------------------

    def look_ahead(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        beside: tuple[int, Sequence[int]] = (0, ()),
    ) -> None:
        """Queue reads of what `layer` is expected to want, behind every demand.

        Uses free and evictable slots only, and evicts none of the expected experts; nor those
        `beside`, of another layer, which are in use without a lease.
        """
        placement = self.placement
        homes = {expert: placement.home(layer, expert) for expert in experts}
        used = [placement.home(beside[0], expert) for expert in beside[1]]
        kept = [home for home in (*homes.values(), *used) if home is not None]
        for tier, slot in kept:
            tier.leases[slot] += 1
        pairs = []
        for expert in (expert for expert, home in homes.items() if home is None):
            free = placement.take_or_evict(ExpertKey(layer, expert), proven=False)
            if free is not None:
                pairs.append((expert, free))
        for tier, slot in kept:
            tier.leases[slot] -= 1
        placement.read(layer, pairs, Priority.LOOKAHEAD)
        issued = {expert for expert, _ in pairs}
        placement.ledger.counters.ahead_issued += len(issued)
        placement.ledger.counters.ahead_dropped += len(issued & self._ahead[layer])
        self._ahead[layer] |= issued

    def _layer_passed(self, layer: int, wanted: Sequence[int]) -> None:
        """Drop what was read ahead for `layer` and is not `wanted` by it; account for it.

        Dropped is also what has lost its slot before the layer came.
        """
        if not self._ahead[layer]:
            return
        homes = {expert: self.placement.home(layer, expert) for expert in self._ahead[layer]}
        self._ahead[layer].clear()
        lost = sum(home is None for home in homes.values())
        unwanted = [home for expert, home in homes.items() if home and expert not in wanted]
        tickets = [ticket for home in unwanted if (ticket := home.ticket) is not None]
        self.placement.queue.drop(tickets)
        dropped = sum(ticket.state is State.DROPPED for ticket in tickets)
        self.placement.ledger.counters.ahead_dropped += lost + dropped
        self.placement.ledger.counters.ahead_wasted += len(unwanted) - dropped

    # -- prefill --------------------------------------------------------------------------------

    def share(self, layer: int) -> int:
        """How many more experts of `layer` a prefill keeps: its part of the tier reads land in."""
        placement, tier = self.placement, self.placement.landing
        record_class = placement.class_of_layer[layer]
        layers = placement.class_of_layer.count(record_class)
        first, last = placement.first[layer], placement.first[layer + 1]
        mine = tier.proven & (tier.owner >= first) & (tier.owner < last)
        return tier.num_slots_of(record_class) // layers - int(np.sum(mine))

    def stream(self, layer: int, experts: Sequence[int], window: int) -> Iterator[Held]:
        """Each of the distinct `experts` once, leased until the next one is asked for; as
        `groups`, one at a time."""
        for group in self.groups(layer, experts, window, 1):
            yield from group

    def groups(
        self, layer: int, experts: Sequence[int], window: int, together: int
    ) -> Iterator[list[Held]]:
        """Each of the distinct `experts` once, leased until the next ones are asked for.

        Those in a tier come first, up to `together` at a time, while up to `window` reads run ahead
        of the consumer; the others one by one.
        """
        self.placement.harvest()
        reads = _PrefillReads(self.placement, layer, window, self.share(layer))
        hits = deque[Held]()
        for expert in experts:
            home = self.placement.home(layer, expert)
            if home is None:
                reads.wanted.append(expert)
            elif home.ticket is None:
                self._count(layer, expert, home, None)
                hits.append(Held(expert, *home))
            else:
                # First, so that making way for the others can hit no read that is wanted.
                reads.wanted.appendleft(expert)
                self.placement.ledger.counters.ahead_late += expert in self._ahead[layer]
        self._layer_passed(layer, experts)
        yield from self._stream_held(hits, reads, together)

    @staticmethod
    def _stream_held(
        hits: deque[Held], reads: "_PrefillReads", together: int
    ) -> Iterator[list[Held]]:
        for held in hits:
            held.tier.leases[held.slot] += 1
        try:
            while hits:
                reads.top_up()
                group = list(islice(hits, together))
                yield group
                for held in group:
                    hits.popleft()
                    held.tier.leases[held.slot] -= 1
        finally:
            for held in hits:
                held.tier.leases[held.slot] -= 1
        while (arrived := reads.next()) is not None:
            arrived.tier.leases[arrived.slot] += 1
            try:
                yield [arrived]
            finally:
                arrived.tier.leases[arrived.slot] -= 1

    def check_integrity(self) -> None:
        """See `Placement.check_integrity`."""
        self.placement.check_integrity()


class Lease:
    """Experts of one layer that stay where they are until `release`; a context manager."""

    def __init__(self, residency: Residency, layer: int) -> None:
        self.layer = layer
        self.ready: list[Held] = []
        self._placement = residency.placement
        self._pending: dict[int, tuple[Held, Ticket]] = {}

    def add(self, held: Held, ticket: Ticket | None) -> None:
        """Take the lease of one expert; `ticket` is the read it still waits for."""
        held.tier.leases[held.slot] += 1
        if ticket is None:
            self.ready.append(held)
        else:
            self._pending[id(ticket)] = (held, ticket)

    def arrivals(self) -> Iterator[Held]:
        """The experts that were not there, in the order in which they arrive; blocks for each.

        Raises:
            ReadError, CorruptError: the read of one failed.
        """
        while self._pending:
            tickets = [ticket for _, ticket in self._pending.values()]
            if not any(ticket.ended for ticket in tickets):
                self._placement.wait_for_any(tickets)
            for ticket in [ticket for ticket in tickets if ticket.ended]:
                yield self._arrived(ticket)

    def _arrived(self, ticket: Ticket) -> Held:
        held, _ = self._pending.pop(id(ticket))
        if ticket.state is not State.DONE:
            held.tier.leases[held.slot] -= 1
        self._placement.settle(held.slot)
        if ticket.error is not None:
            raise ticket.error
        self.ready.append(held)
        return held

    def release(self) -> None:
        """Give every lease back; reads still under way go on and are kept or reused."""
        for held, _ in self._pending.values():
            held.tier.leases[held.slot] -= 1
        for held in self.ready:
            held.tier.leases[held.slot] -= 1
        self._pending.clear()
        if self._placement.promotes:
            self._promote([held.slot for held in self.ready if held.tier is self._placement.warm])
        self.ready = []

    def _promote(self, slots: Sequence[int]) -> None:
        """Move up to `_PROMOTIONS_PER_LAYER` of the warm experts just used to the hot tier."""
        moved = 0
        for slot in slots:
            moved += self._placement.promote(slot)
            if moved == _PROMOTIONS_PER_LAYER:
                return

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class _PrefillReads:
    """The reads of one layer's prefill: in order, `window` at most ahead of the consumer.

    Free slots are filled up to the layer's share of the tier. Beyond that, reads pass through slots
    that hold nothing proven, of which at most `window` are taken from what decode has learnt.
    """

    def __init__(self, placement: Placement, layer: int, window: int, share: int) -> None:
        self.wanted: deque[int] = deque()
        self._placement, self._layer, self._window = placement, layer, window
        self._record_class = placement.class_of_layer[layer]
        self._pending: deque[tuple[int, int, Ticket]] = deque()
        self._share_left = share

    def top_up(self) -> None:
        """Queue further reads while slots and the window allow."""
        pairs: list[tuple[int, int]] = []
        while self.wanted and len(self._pending) + len(pairs) < self._window:
            expert = self.wanted[0]
            home = self._placement.home(self._layer, expert)
            if home is not None:
                self._adopt(expert, home)
            elif (slot := self._slot(expert)) is not None:
                pairs.append((expert, slot))
            else:
                break
            self.wanted.popleft()
        tickets = self._placement.read(self._layer, pairs, Priority.DEMAND)
        for (expert, slot), ticket in zip(pairs, tickets, strict=True):
            self._pending.append((expert, slot, ticket))

    def _adopt(self, expert: int, home: Home) -> None:
        """A read that was under way already, from look-ahead or an abandoned lease."""
        ticket = home.ticket
        assert ticket is not None, "a resident expert among the misses"
        self._placement.queue.demand([ticket])
        self._pending.append((expert, home.slot, ticket))

    def _slot(self, expert: int) -> int | None:
        key, placement = ExpertKey(self._layer, expert), self._placement
        admitted = self._share_left > 0
        slot = placement.take(key, proven=admitted)
        if slot is None and placement.evict(self._record_class, unproven_only=True):
            slot = placement.take(key, proven=admitted)
        if slot is not None:
            self._share_left -= admitted
            return slot
        if placement.num_passing(self._record_class) < self._window:
            return placement.take_or_evict(key, proven=False)
        return None

    def next(self) -> Held | None:
        """The next expert read, or None after the last; blocks until it is there."""
        while True:
            self.top_up()
            if not self._pending and not self.wanted:
                return None
            if not self._pending:
                made = self._placement.make_way(self._record_class)
                assert made, "prefill found no slot"
                continue
            expert, slot, ticket = self._pending.popleft()
            if not ticket.ended:
                self._placement.wait_for_any([ticket])
            self._placement.settle(slot)
            if ticket.state is State.DROPPED:
                self.wanted.appendleft(expert)
                continue
            if ticket.error is not None:
                raise ticket.error
            self._placement.ledger.counters.cold += 1
            return Held(expert, self._placement.landing, slot)
