"""Placement: the map from experts to slots, and the four things that change it.

A slot is taken (possibly by eviction), filled by a read, settled when that read has ended, and
moved between tiers. Who wants which expert when is `tierrun.tiers.residency`'s business.

Everything here runs on the model's thread; the I/O threads only end tickets.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.io.reads import ReadQueue
from tierrun.io.store import ExpertKey, Manifest
from tierrun.io.tickets import Priority, State, Ticket
from tierrun.tiers.ledger import Ledger
from tierrun.tiers.policy import Experts, Policy
from tierrun.tiers.slab import host_bytes
from tierrun.tiers.tier import SlotState, Tier


class Home(NamedTuple):
    """Where an expert is, or will be when its read has ended."""

    tier: Tier
    slot: int

    @property
    def ticket(self) -> Ticket | None:
        """The read that fills the slot, while it does."""
        return self.tier.tickets.get(self.slot)


class Watcher(Protocol):
    """Is told which experts are whole in the tier that reads land in, by their numbers."""

    def came(self, expert: int, address: int) -> None:
        """The record is at `address` in host memory from now on."""

    def went(self, expert: int) -> None:
        """It is not there any more, or was never whole; nothing has been written over it yet."""


class Placement:
    """Which slot of which tier holds each expert of a store.

    Reads land in the warm tier, or in the hot one where there is no warm. An expert is in one slot
    at most: what moves up leaves the slot below.
    """

    def __init__(
        self,
        manifest: Manifest,
        hot: Tier,
        warm: Tier,
        policy: Policy,
        queue: ReadQueue,
        ledger: Ledger,
    ) -> None:
        self.hot, self.warm = hot, warm
        self.landing = warm if warm.num_slots else hot
        self.promotes = bool(hot.num_slots and warm.num_slots)
        self.policy, self.queue, self.ledger = policy, queue, ledger
        self.class_of_layer = [layer.record_class for layer in manifest.layers]
        self.top_k = [layer.top_k for layer in manifest.layers]
        self.sizes = np.array([len(layer.records) for layer in manifest.layers], np.int64)
        self.first = np.cumsum([0, *self.sizes]).astype(np.int64)
        self._first: list[int] = self.first.tolist()
        self.homes: dict[int, Home] = {}
        self.backed: NDArray[np.bool_] | None = None
        """Over experts: what a cache above these tiers holds, so that nothing is lost here."""
        self.watcher: Watcher | None = None
        self.step = 0
        self._spare = torch.empty(max(c.nbytes for c in manifest.classes), dtype=torch.uint8)

    def indices(self, layer: int, experts: Sequence[int]) -> Experts:
        """The numbers of a layer's experts over all layers, as policies count."""
        return np.array(experts, dtype=np.int64) + self._first[layer]

    def index(self, layer: int, expert: int) -> int:
        """The number of one of them."""
        return self._first[layer] + expert

    def home(self, layer: int, expert: int) -> Home | None:
        return self.homes.get(self._first[layer] + expert)

    # -- taking a slot --------------------------------------------------------------------------

    def take(self, key: ExpertKey, *, proven: bool) -> int | None:
        """A free landing slot for `key`, or None."""
        index = self.index(*key)
        slot = self.landing.take(self.class_of_layer[key.layer], index, proven=proven)
        if slot is not None:
            self.homes[index] = Home(self.landing, slot)
        return slot

    def take_or_evict(self, key: ExpertKey, *, proven: bool) -> int | None:
        """A landing slot for `key`, evicting what is worth least; None if all are in use."""
        slot = self.take(key, proven=proven)
        if slot is None and self.evict(self.class_of_layer[key.layer]):
            slot = self.take(key, proven=proven)
        return slot

    def evict(self, record_class: int, *, unproven_only: bool = False) -> bool:
        """Free the landing slot worth least, unproven ones first; False if none can be freed."""
        slot = self.victim(self.landing, record_class, unproven_only=unproven_only)
        if slot is None:
            return False
        self.vacate(slot)
        return True

    def vacate(self, slot: int) -> None:
        """Free a landing slot: its expert is not here any more."""
        index = int(self.landing.owner[slot])
        del self.homes[index]
        self.landing.give(slot)
        if self.watcher is not None:
            self.watcher.went(index)

    def arrive(self, slot: int) -> None:
        """A landing slot that a copy has filled becomes READY, and its expert's home.

        Until then nobody finds it; where the expert was read meanwhile, it is free again.
        """
        index = int(self.landing.owner[slot])
        if index in self.homes:
            self.landing.give(slot)
            return
        self.homes[index] = Home(self.landing, slot)
        self._ready(slot)

    def _ready(self, slot: int) -> None:
        self.landing.state[slot] = SlotState.READY
        if self.watcher is not None:
            self.watcher.came(int(self.landing.owner[slot]), self.landing.memory(slot).data_ptr())

    def victim(self, tier: Tier, record_class: int, *, unproven_only: bool = False) -> int | None:
        """The slot of `tier` to reuse next: READY, unleased, unproven before proven.

        Before both, what the cache above holds: it is of no use here, proven or not.
        """
        slots = tier.evictable(record_class)
        for preferred in (self._backed(tier, slots), slots[~tier.proven[slots]]):
            if len(preferred):
                return self._least(tier, preferred)
        return None if unproven_only or len(slots) == 0 else self._least(tier, slots)

    def _backed(self, tier: Tier, slots: Experts) -> Experts:
        return slots[:0] if self.backed is None else slots[self.backed[tier.owner[slots]]]

    def _least(self, tier: Tier, slots: Experts) -> int:
        worth = self.policy.worth(tier.owner[slots], self.step)
        return int(slots[np.argmin(worth)])

    def num_passing(self, record_class: int) -> int:
        """Landing slots of the class that hold, or will hold, something unproven."""
        tier = self.landing
        mask = (tier.state != SlotState.FREE) & ~tier.proven & (tier.record_class == record_class)
        return int(mask.sum())

    # -- reading into it ------------------------------------------------------------------------

    def read(
        self, layer: int, pairs: Sequence[tuple[int, int]], priority: Priority
    ) -> list[Ticket]:
        """Queue reads of (expert, landing slot) pairs, in one submission."""
        requests = [
            (ExpertKey(layer, expert), host_bytes(self.landing.memory(slot)), priority)
            for expert, slot in pairs
        ]
        tickets = self.queue.submit(requests) if requests else []
        for (_, slot), ticket in zip(pairs, tickets, strict=True):
            self.landing.tickets[slot] = ticket
        return tickets

    def wait_for_any(self, tickets: Sequence[Ticket]) -> None:
        """Block until one of `tickets` has ended."""
        started = time.perf_counter()
        next(iter(self.queue.arrivals(tickets)))
        self.ledger.counters.wait_seconds += time.perf_counter() - started

    def harvest(self) -> None:
        """Settle every slot whose read has ended, unless somebody waits for it: he settles it."""
        if not self.landing.tickets:
            return
        for slot, ticket in list(self.landing.tickets.items()):
            if ticket.ended and self.landing.leases[slot] == 0:
                self.settle(slot)

    def make_way(self, record_class: int) -> bool:
        """Give up reads that nobody waits for (ahead, or of an abandoned lease) until one has
        ended; False if there is none."""
        tier = self.landing
        idle = [
            ticket
            for slot, ticket in tier.tickets.items()
            if tier.leases[slot] == 0 and tier.record_class[slot] == record_class
        ]
        if not idle:
            return False
        self.queue.drop(idle)
        self.wait_for_any(idle)
        self.harvest()
        return True

    def abandon(self, layer: int, experts: Sequence[int]) -> None:
        """Give back slots that were taken for `experts` and whose read was never queued."""
        for index in self.indices(layer, experts).tolist():
            tier, slot = self.homes[index]
            if slot not in tier.tickets:
                del self.homes[index]
                tier.give(slot)

    def settle(self, slot: int) -> None:
        """A landing slot whose read has ended becomes READY, or FREE where the read failed."""
        ticket = self.landing.tickets.pop(slot)
        assert ticket.ended, f"{ticket.key} is still being read"
        if ticket.state is State.DONE:
            self._ready(slot)
            self.ledger.counters.read_bytes += len(ticket.into)
        else:
            self.vacate(slot)

    # -- moving between tiers -------------------------------------------------------------------

    def promote(self, slot: int) -> bool:
        """Move a READY warm slot's expert to the hot tier if it is worth more than what is there.

        What it displaces is demoted to the warm slot that becomes free: nothing is lost.
        """
        record_class = int(self.warm.record_class[slot])
        index = int(self.warm.owner[slot])
        target = self.hot.take(record_class, index, proven=True)
        if target is not None:
            self._copy_up(slot, target, index)
            return True
        victim = self.victim(self.hot, record_class)
        if victim is None or not self._worth_more(index, int(self.hot.owner[victim])):
            return False
        self._swap(slot, victim)
        return True

    def _worth_more(self, index: int, other: int) -> bool:
        mine, its = self.policy.worth(np.array([index, other]), self.step)
        return bool(mine > its)

    def _copy_up(self, slot: int, target: int, index: int) -> None:
        started = time.perf_counter()
        self.hot.memory(target).copy_(self.warm.memory(slot))
        self.hot.state[target] = SlotState.READY
        self.homes[index] = Home(self.hot, target)
        self.warm.give(slot)
        self._count_copies(started, self.hot.memory(target).numel(), 0)

    def _swap(self, slot: int, victim: int) -> None:
        started = time.perf_counter()
        below, above = self.warm.memory(slot), self.hot.memory(victim)
        spare = self._spare[: below.numel()]
        spare.copy_(above)
        above.copy_(below)
        below.copy_(spare)
        rising, sinking = int(self.warm.owner[slot]), int(self.hot.owner[victim])
        self.hot.owner[victim], self.warm.owner[slot] = rising, sinking
        self.homes[rising], self.homes[sinking] = Home(self.hot, victim), Home(self.warm, slot)
        self._count_copies(started, below.numel(), below.numel())

    def _count_copies(self, started: float, up: int, down: int) -> None:
        counters = self.ledger.counters
        counters.promoted_bytes += up
        counters.demoted_bytes += down
        counters.copy_seconds += time.perf_counter() - started

    def check_integrity(self) -> None:
        """Every tier's arrays agree, and slots and experts point at each other."""
        for tier in (self.hot, self.warm):
            tier.check_integrity()
        held = {
            int(owner): Home(tier, slot)
            for tier in (self.hot, self.warm)
            for slot, owner in enumerate(tier.owner)
            if owner >= 0
        }
        assert held == self.homes, "slots and homes differ"
        for index, (tier, slot) in self.homes.items():
            layer = int(np.searchsorted(self.first, index, side="right")) - 1
            assert tier.record_class[slot] == self.class_of_layer[layer], "slot of another class"
