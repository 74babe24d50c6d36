"""Experts on their way between the warm tier and VRAM.

Promotion copies: the warm slot keeps its expert, and is only *held* (leased) until the copy has
ended, so that no read overwrites what is being copied. Demotion follows when a slot in VRAM becomes
unproven whose expert the warm tier does not hold: its bytes go into a warm slot, or, where what
that slot holds is worth more, nowhere: they can be read again.

A promotion that nobody waits for is *deferred*: its slot in VRAM is FILLING until `ended` says that
the copy is over.

Guarantees:
- a warm slot that a demotion fills is FILLING, and found by nobody, until that copy has ended;
- a slot in VRAM is leased, so not overwritten, until the demotion that reads it has ended.
Assumes: `settle` and `reap` come before the residency is asked for anything.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tierrun.tiers.copies import Copies, Copy, Pairs
from tierrun.tiers.ledger import Ledger
from tierrun.tiers.placement import Placement
from tierrun.tiers.vramslots import VramSlots


def worth_demoting(worth: float, victim_worth: float, *, backed: bool) -> bool:
    """Whether to copy an expert down in place of the least that the warm tier holds.

    One of the two has to be read again when it is next wanted, which costs the same for both; the
    copy costs a tenth of that and runs beside everything else. So the one that is wanted sooner
    stays. Where VRAM holds the victim as well (`backed`), nothing is lost at all.
    """
    return backed or worth > victim_worth


class _Promotion(NamedTuple):
    """Copies up that were enqueued together, and the warm slots that they hold."""

    copy: Copy
    sources: list[int]


class Transfers:
    """The copies of one VRAM tier under way, and the slots that they hold."""

    def __init__(
        self, placement: Placement, slots: VramSlots, copies: Copies, ledger: Ledger
    ) -> None:
        self._placement, self._slots, self._copies = placement, slots, copies
        self._warm, self._counters = placement.warm, ledger.counters
        self._promotions: deque[_Promotion] = deque()
        self._held = 0
        """Warm slots in `_promotions`."""
        self._deferred: deque[tuple[_Promotion, list[int]]] = deque()
        self._demotions: list[tuple[Copy, list[tuple[int, int]]]] = []
        self._sinking: set[int] = set()

    # -- up -------------------------------------------------------------------------------------

    def promote(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (warm slot, slot in VRAM) up; each warm slot is held until its copy has ended."""
        promotion = self._copy_up(pairs, self._copies.to_device)
        self._held += len(promotion.sources)
        self._promotions.append(promotion)

    def _copy_up(
        self, pairs: Sequence[tuple[int, int]], enqueue: Callable[[Pairs], Copy]
    ) -> _Promotion:
        up = [(self._slots.tier.memory(to), self._warm.memory(source)) for source, to in pairs]
        sources = [source for source, _ in pairs]
        copy = enqueue(up)
        for source in sources:
            self._warm.leases[source] += 1
        self._counters.promoted_bytes += sum(target.numel() for target, _ in up)
        return _Promotion(copy, sources)

    def reap(self, most: int = 0) -> None:
        """Wait until at most `most` warm slots are held."""
        while self._held > most or (self._promotions and not self._promotions[0].sources):
            promotion = self._promotions.popleft()
            self._end(promotion)
            self._held -= len(promotion.sources)

    def _end(self, promotion: _Promotion) -> None:
        """Wait for it, and let its warm slots go."""
        self._counters.copy_seconds += promotion.copy.wait()
        for source in promotion.sources:
            self._warm.leases[source] -= 1

    def defer(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy warm slots up into FILLING slots in VRAM, beside everything; all stay held."""
        promotion = self._copy_up(pairs, self._copies.aside)
        self._deferred.append((promotion, [to for _, to in pairs]))

    @property
    def num_copies(self) -> int:
        """Batches that have not been waited for."""
        return len(self._promotions) + len(self._demotions) + len(self._deferred)

    @property
    def deferred(self) -> list[int]:
        """The slots in VRAM that they fill."""
        return [slot for _, slots in self._deferred for slot in slots]

    def ended(self, *, wait: bool = False) -> list[int]:
        """The slots in VRAM whose deferred copies are over now; with `wait`, of all."""
        ended = list[int]()
        while self._deferred and (wait or self._deferred[0][0].copy.is_done()):
            promotion, slots = self._deferred.popleft()
            self._end(promotion)
            ended += slots
        return ended

    # -- down -----------------------------------------------------------------------------------

    def demote(self, displaced: Sequence[int]) -> None:
        """Copy those of the slots in VRAM down that the warm tier lacks, where it is worth it."""
        pairs = []
        try:
            for slot in displaced:
                target = self._landing_for(slot)
                if target is not None:
                    pairs.append((slot, target))
                    self._sinking.add(int(self._slots.tier.owner[slot]))
            if pairs:
                self._copy_down(pairs)
        except BaseException:
            self._give_up(pairs)
            raise

    def admit(self, slots: Sequence[int]) -> None:
        """Let those of `slots` stay that are worth it; demote what they displace."""
        displaced = self._slots.admit(slots)
        if displaced:
            self.demote(displaced)

    def _copy_down(self, pairs: list[tuple[int, int]]) -> None:
        down = [(self._warm.memory(to), self._slots.tier.memory(source)) for source, to in pairs]
        copy = self._copies.to_host(down)
        self._slots.tier.leases[[source for source, _ in pairs]] += 1
        self._demotions.append((copy, pairs))
        self._counters.demoted_bytes += sum(target.numel() for target, _ in down)

    def _give_up(self, pairs: list[tuple[int, int]]) -> None:
        """Nothing goes down: the warm slots taken for it are free again."""
        self._copies.synchronize()
        for _, target in pairs:
            self._sinking.discard(int(self._warm.owner[target]))
            self._warm.give(target)

    def settle(self) -> bool:
        """Wait for every demotion, and let its expert be found; False if there was none."""
        if not self._demotions:
            return False
        demotions, self._demotions = self._demotions, []
        for copy, pairs in demotions:
            self._counters.copy_seconds += copy.wait()
            for source, target in pairs:
                self._slots.tier.leases[source] -= 1
                self._placement.arrive(target)
        self._sinking.clear()
        return True

    def _landing_for(self, slot: int) -> int | None:
        """A warm slot for what `slot` holds, FILLING; None if it is there, or not worth it."""
        expert = int(self._slots.tier.owner[slot])
        if expert in self._placement.homes or expert in self._sinking:
            return None
        record_class = int(self._slots.tier.record_class[slot])
        target = self._warm.take(record_class, expert, proven=True)
        if target is None and self._make_way(expert, record_class):
            target = self._warm.take(record_class, expert, proven=True)
        return target

    def _make_way(self, expert: int, record_class: int) -> bool:
        if self._swap_out(record_class):
            return True
        victim = self._placement.victim(self._warm, record_class)
        if victim is None:
            return False
        other = int(self._warm.owner[victim])
        both = np.array([expert, other], dtype=np.int64)
        mine, its = self._placement.policy.worth(both, self._placement.step)
        if not worth_demoting(mine, its, backed=bool(self._slots.proven_experts[other])):
            return False
        self._placement.vacate(victim)
        return True

    def _swap_out(self, record_class: int) -> bool:
        """Free a warm slot whose expert was copied up just now and stays there.

        The copy up may still be reading it: a copy down starts after every earlier copy up.
        """
        warm = self._warm
        for promotion in self._promotions:
            sources = promotion.sources
            for slot in sources:
                backed = self._slots.proven_experts[warm.owner[slot]]
                if backed and warm.leases[slot] == 1 and warm.record_class[slot] == record_class:
                    sources.remove(slot)
                    self._held -= 1
                    warm.leases[slot] -= 1
                    self._placement.vacate(slot)
                    return True
        return False
