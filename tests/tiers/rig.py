"""A residency over a store made by hand and a fake reader, with everything checked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tests.fakes import Experts, FakeReader, TinyStore, tiny_store

from tierrun.io.extent import PAGE
from tierrun.io.reads import ReadQueue
from tierrun.io.store import ExpertKey
from tierrun.tiers.ledger import Counters, Ledger
from tierrun.tiers.placement import Placement
from tierrun.tiers.policy import make_policy
from tierrun.tiers.residency import Held, Residency
from tierrun.tiers.slab import Slab
from tierrun.tiers.tier import SlotState, Tier


@dataclass
class Rig:
    """What a residency stands on, and checks of what it promises."""

    tiny: TinyStore
    reader: FakeReader
    queue: ReadQueue
    placement: Placement
    residency: Residency

    @property
    def counters(self) -> Counters:
        return self.placement.ledger.counters

    def place(self, layer: int, expert: int) -> tuple[int, int]:
        """Shard and offset of an expert's record, as the reader is asked for it."""
        record, extent = self.tiny.store.locate(ExpertKey(layer, expert))
        return record.shard, extent.offset

    def experts_in(self, tier: Tier, layer: int) -> set[int]:
        """The experts of `layer` that are READY in `tier`."""
        first, last = self.placement.first[layer], self.placement.first[layer + 1]
        owners = tier.owner[tier.state == SlotState.READY]
        return set((owners[(owners >= first) & (owners < last)] - first).tolist())

    def check_held(self, layer: int, held: Held) -> None:
        """A leased expert is READY, leased, and has the store's bytes."""
        assert held.tier.state[held.slot] == SlotState.READY
        assert held.tier.leases[held.slot] > 0
        truth = self.tiny.record(ExpertKey(layer, held.expert))
        assert held.tier.memory(held.slot).numpy().tobytes() == truth

    def check_idle(self) -> None:
        """Between layers: nothing leased, nothing in the wrong place, no byte wrong."""
        self.residency.check_integrity()
        keys = [
            ExpertKey(number, expert)
            for number, layer in enumerate(self.tiny.store.manifest.layers)
            for expert in range(len(layer.records))
        ]
        for tier in (self.placement.hot, self.placement.warm):
            assert not tier.leases.any(), "leased between layers"
            used = sum(tier.memory(slot).numel() for slot in range(tier.num_slots))
            assert used <= tier.slab.nbytes
            for slot in np.flatnonzero(tier.state == SlotState.READY):
                truth = self.tiny.record(keys[tier.owner[slot]])
                assert tier.memory(slot).numpy().tobytes() == truth, "wrong bytes in a READY slot"

    def drain(self) -> None:
        """Wait for every read and settle it."""
        tickets = list(self.placement.landing.tickets.values())
        for _ in self.queue.arrivals(tickets):
            pass
        self.placement.harvest()

    def decode(self, layer: int, experts: Sequence[int], ahead: Sequence[int] = ()) -> None:
        """One layer of one token: lease all, look ahead, wait for all, release."""
        with self.residency.lease(layer, experts) as lease:
            if ahead:
                self.residency.look_ahead(layer + 1, ahead)
            for _ in lease.arrivals():
                pass
            assert {held.expert for held in lease.ready} == set(experts)
            for held in lease.ready:
                self.check_held(layer, held)

    def prefill(self, layer: int, experts: Sequence[int], window: int = 1) -> list[int]:
        """The experts in the order in which they came."""
        order = []
        for held in self.residency.stream(layer, experts, window):
            self.check_held(layer, held)
            order.append(held.expert)
        return order


@contextmanager
def make_rig(
    *,
    hot: Sequence[int] = (0,),
    warm: Sequence[int] = (0,),
    layers: Sequence[Experts] = (Experts(), Experts(), Experts()),
    policy: str = "rates",
    depth: int = 2,
) -> Iterator[Rig]:
    """Slots per record class in each tier; an extent holds one record of any class."""
    tiny = tiny_store(layers)
    manifest = tiny.store.manifest
    sizes = tuple(cls.nbytes for cls in manifest.classes)
    tiers = []
    for name, slots in (("hot", hot), ("warm", warm)):
        tier = Tier(name, Slab(sum(slots), max(sizes)), sizes)
        classes = [number for number, count in enumerate(slots) for _ in range(count)]
        for extent, record_class in enumerate(classes):
            tier.assign(extent, record_class)
        tiers.append(tier)
    reader = FakeReader(tiny.images)
    queue = ReadQueue(tiny.store, reader, depth, PAGE)
    placement = Placement(
        manifest, *tiers, make_policy(policy, manifest.num_experts), queue, Ledger()
    )
    try:
        yield Rig(tiny, reader, queue, placement, Residency(placement))
    finally:
        reader.held = lambda shard, offset: False
        queue.close()


def hold_all(rig: Rig) -> None:
    rig.reader.held = lambda shard, offset: True


def let_go(rig: Rig) -> None:
    rig.reader.held = lambda shard, offset: False


def learn(rig: Rig, layer: int, experts: Sequence[int], times: int = 3) -> None:
    """Decode that uses `experts` again and again, two at a time."""
    for _ in range(times):
        rig.residency.next_step()
        for first in range(0, len(experts), 2):
            rig.decode(layer, experts[first : first + 2])
