"""A VRAM tier over a residency made by hand, and the device that reads from it."""

import ctypes
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import pytest
import torch
from tests.fakes import Experts, TinyStore
from tests.tiers.rig import Rig, make_rig
from tests.tiers.streams import FakeStreams

from tierrun.io.store import ExpertKey
from tierrun.tiers.copies import Copies, CudaCopies, HostCopies
from tierrun.tiers.memory import DeviceMemory, Memory
from tierrun.tiers.residency import Held
from tierrun.tiers.slab import Slab
from tierrun.tiers.slottable import ABSENT, FOR_HOST, IN_PLACE, KIND, InRam
from tierrun.tiers.staging import BounceBuffers
from tierrun.tiers.straight import StraightReads
from tierrun.tiers.tier import NOBODY, SlotState, Tier
from tierrun.tiers.vram import Arrival, Choose, VramTier

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

KINDS = ["host", "fake", pytest.param("cuda", marks=on_cuda)]
"""Copies at once, copies held back until somebody waits for them, and a GPU's."""


def make_copies(kind: str) -> Copies:
    if kind == "cuda":
        return CudaCopies(CUDA)
    return FakeStreams() if kind == "fake" else HostCopies()


def device_of(copies: Copies) -> torch.device:
    return CUDA if isinstance(copies, CudaCopies) else CPU


@dataclass
class VramRig:
    """The engine's part: kernels that read slots, and a host that learns what routers chose."""

    rig: Rig
    vram: VramTier
    tier: Tier
    copies: Copies
    seen: list[tuple[ExpertKey, torch.Tensor]] = field(default_factory=list)
    unaccounted: list[tuple[int, np.ndarray]] = field(default_factory=list)
    choose: Choose | None = None
    drive: "DriveReads" = field(init=False)
    computed: list[ExpertKey] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drive = DriveReads(self.rig.tiny)

    # -- the device -----------------------------------------------------------------------------

    def launch(self, layer: int, arrivals: Sequence[Arrival]) -> None:
        """A kernel that reads records in place, whenever it runs."""
        for (expert, _), slot in zip(arrivals, self.slots(arrivals), strict=True):
            self._read(ExpertKey(layer, expert), self.tier.memory(slot))

    def _read(self, key: ExpertKey, memory: torch.Tensor) -> None:
        self._on_compute(lambda: self.seen.append((key, memory.clone())))

    def letter(self, layer: int, experts: Sequence[int]) -> list[int]:
        """What the device finds in the table; everything launched before has ended then."""
        found: list[torch.Tensor] = []
        self._on_compute(lambda: found.append(self.vram.table_of(layer)[list(experts)]))
        if isinstance(self.copies, FakeStreams):
            self.copies.compute.advance(self.copies.compute.enqueued)
        offsets: list[int] = found[0].cpu().tolist()
        return offsets

    def _on_compute(self, work: Callable[[], None]) -> None:
        if isinstance(self.copies, FakeStreams):
            self.copies.compute.enqueue(work)
        else:
            work()

    def check_seen(self) -> None:
        """Every kernel has seen the store's bytes."""
        self.copies.synchronize()
        for key, memory in self.seen:
            assert memory.cpu().numpy().tobytes() == self.rig.tiny.record(key), key
        self.seen.clear()

    # -- the host -------------------------------------------------------------------------------

    def decode(self, layer: int, experts: Sequence[int], patience: int = 100) -> list[int]:
        """One layer of a decode, perhaps given up after `patience` lists; what was brought."""
        entries = self.letter(layer, experts)
        assert entries == self.expected(layer, experts)
        self.computed.clear()
        missing = self._launch_found(layer, experts, entries)
        if not missing:
            self.unaccounted.append((layer, np.array(experts, dtype=np.int64)))
            return []
        self.account()
        found = list(self.computed)
        many = len(experts) > self.rig.placement.top_k[layer] and self.in_place
        if many or self.vram.in_ram is InRam.FOR_HOST:  # as the engine does
            self.copies.synchronize()  # what is read in RAM may be replaced by the first group
            self.unaccounted.append((layer, np.setdiff1d(experts, missing)))
            self.account()
            experts = missing
        brought = []
        for arrived in self.limited(self.fetched(layer, experts), patience):
            self.copies.ready()
            self.launch(layer, arrived)
            brought += [expert for expert, _ in arrived]
        return brought + [key.expert for key in self.computed if key not in found]

    @property
    def in_place(self) -> bool:
        """Whether experts are computed in RAM without being fetched."""
        return self.vram.in_ram is not InRam.HIDDEN

    def _launch_found(
        self, layer: int, experts: Sequence[int], entries: Sequence[int]
    ) -> list[int]:
        """Compute what the device has found, or left to the CPU; what is missing."""
        missing, here = [], []
        for expert, entry in zip(experts, entries, strict=True):
            kind, address = entry & KIND, self.vram.base.data_ptr() + (entry & ~KIND)
            if kind == ABSENT & KIND:
                missing.append(expert)
            elif kind == 0:
                here.append(Arrival(expert, entry))
            else:
                self._read_in_ram(ExpertKey(layer, expert), address, kind == FOR_HOST)
        self.launch(layer, here)
        return missing

    def _read_in_ram(self, key: ExpertKey, address: int, at_once: bool) -> None:
        """By the CPU at once, or by a kernel whenever it runs."""
        size = len(self.rig.tiny.record(key))

        def look() -> None:
            memory = torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=torch.uint8)
            self.seen.append((key, memory))

        self.computed.append(key)
        if at_once:
            look()
        else:
            self._on_compute(look)

    def fetched(self, layer: int, experts: Sequence[int]) -> Iterator[list[Arrival]]:
        """What comes up; the rest is computed in RAM, as many as `choose` leaves."""
        if not self.in_place:
            self.computed.clear()
        choose = _none if self.in_place else self.choose
        for brought in self.vram.fetch(layer, experts, choose):
            for held in brought.held:
                assert held.tier.leases[held.slot] > 0, "not leased"
                memory, key = held.tier.memory(held.slot), ExpertKey(layer, held.expert)
                assert memory.numpy().tobytes() == self.rig.tiny.record(key), key
                if key not in self.computed:
                    at_once = self.vram.in_ram is not InRam.IN_PLACE
                    self._read_in_ram(key, memory.data_ptr(), at_once)
            if len(experts) > self.rig.placement.top_k[layer] and self.in_place:
                self.copies.synchronize()
            if brought.arrived:
                yield brought.arrived

    def account(self) -> None:
        if self.unaccounted:
            first = self.rig.placement.first
            self.vram.served(np.concatenate([e + first[layer] for layer, e in self.unaccounted]))
        self.unaccounted.clear()

    def prefill(
        self, layer: int, experts: Sequence[int], group: int | None = None, patience: int = 100
    ) -> list[list[int]]:
        """One layer of a prompt; the experts of each group."""
        self.account()
        self.letter(layer, experts)
        groups = []
        for arrived in self.limited(self.vram.stream(layer, experts, group), patience):
            self.copies.ready()
            self.launch(layer, arrived)
            groups.append([expert for expert, _ in arrived])
        return groups

    def limited(self, lists: Iterator[list[Arrival]], patience: int) -> Iterator[list[Arrival]]:
        """The first `patience` of `lists`, every one of which is leased while it is out."""
        for arrived in lists:
            slots = self.slots(arrived)
            assert (self.tier.leases[slots] > 0).all(), "not leased"
            assert (self.tier.state[slots] == SlotState.READY).all()
            yield arrived
            patience -= 1
            if patience <= 0:
                return

    def slots(self, arrived: Sequence[Arrival]) -> list[int]:
        slot_at = {self.vram.slots.offset(s): s for s in range(len(self.tier.owner))}
        return [slot_at[offset] for _, offset in arrived]

    def expected(self, layer: int, experts: Sequence[int]) -> list[int]:
        """What the table must say."""
        found = self.mirror(layer, experts)
        if not self.in_place:
            return found
        placement, base = self.rig.placement, self.vram.base.data_ptr()
        kind = IN_PLACE if self.vram.in_ram is InRam.IN_PLACE else FOR_HOST
        for place, expert in enumerate(experts):
            home = placement.home(layer, expert)
            if found[place] == ABSENT and home and home.ticket is None:
                found[place] = home.tier.memory(home.slot).data_ptr() - base + kind
        return found

    def mirror(self, layer: int, experts: Sequence[int]) -> list[int]:
        slots = self.vram.slots.slot_of[self.rig.placement.indices(layer, experts)]
        return [self.vram.slots.offset(s) if s != NOBODY else -1 for s in slots.tolist()]

    def here(self, layer: int) -> set[int]:
        """The experts of `layer` in VRAM."""
        return self.rig.experts_in(self.tier, layer)

    def proven(self, layer: int) -> set[int]:
        first, last = self.rig.placement.first[layer : layer + 2]
        return set(np.flatnonzero(self.vram.slots.proven_experts[first:last]).tolist())

    def warm(self, layer: int) -> set[int]:
        return self.rig.experts_in(self.rig.placement.warm, layer)

    def check_idle(self) -> None:
        """Between calls: no book wrong, nothing leased, no byte wrong, no budget exceeded."""
        self.vram.check_integrity()
        self.rig.check_idle()
        assert sum(self.tier.memory(s).numel() for s in range(len(self.tier.owner))) <= (
            self.vram.nbytes
        )
        keys = [
            ExpertKey(number, expert)
            for number, layer in enumerate(self.rig.tiny.store.manifest.layers)
            for expert in range(len(layer.records))
        ]
        for slot in np.flatnonzero(self.tier.state == SlotState.READY).tolist():
            truth = self.rig.tiny.record(keys[int(self.tier.owner[slot])])
            assert self.tier.memory(slot).cpu().numpy().tobytes() == truth
        self.check_seen()


class DriveReads:
    """A `DeviceReader` over a tiny store's bytes; counts them, and fails where it is told to."""

    name = "fake"

    def __init__(self, tiny: TinyStore) -> None:
        self._images, self._lock = tiny.images, Lock()
        self.failures: Counter[tuple[int, int]] = Counter()
        self.nbytes, self.delay = 0, 0.0

    def read_device(self, shard: int, offset: int, into: torch.Tensor) -> None:
        time.sleep(self.delay)
        with self._lock:
            self.nbytes += into.nbytes
            if self.failures[shard, offset] > 0:
                self.failures[shard, offset] -= 1
                raise OSError(5, "injected")
        image = memoryview(self._images[shard])[offset : offset + into.nbytes]
        into.copy_(torch.frombuffer(bytearray(image), dtype=torch.uint8))


def _none(held: list[Held]) -> int:
    return 0


@contextmanager
def make_vram(
    copies: Copies | str = "host",
    *,
    vram: Sequence[int] = (4,),
    warm: Sequence[int] = (4,),
    layers: Sequence[Experts] = (Experts(), Experts(), Experts()),
    policy: str = "rates",
    depth: int = 2,
    window: int = 1,
    chunks: int = 4,
    memory: Memory | None = None,
    straight: bool = False,
    in_ram: InRam = InRam.HIDDEN,
) -> Iterator[VramRig]:
    """Slots per record class in each tier, as in `make_rig`; `straight` reads past the warm one."""
    made = make_copies(copies) if isinstance(copies, str) else copies
    with make_rig(hot=[0] * len(warm), warm=warm, layers=layers, policy=policy, depth=depth) as rig:
        sizes = rig.placement.warm.record_bytes
        slab = Slab(sum(vram), max(sizes), memory or DeviceMemory(device_of(made)), chunks)
        tier = Tier("vram", slab, sizes)
        classes = [number for number, count in enumerate(vram) for _ in range(count)]
        for extent, record_class in enumerate(classes):
            tier.assign(extent, record_class)
        it = VramRig(rig, VramTier(rig.residency, tier, made, window, in_ram), tier, made)
        if straight:
            buffers = BounceBuffers(device_of(made), 2)
            it.vram.straight = StraightReads(rig.tiny.store, it.drive, buffers, 3, lambda: None)
        try:
            with pinned(rig.placement.warm.slab.base, made):
                yield it
                rig.drain()
                it.check_idle()
                it.vram.close()
        finally:
            if it.vram.straight is not None:
                it.vram.straight.close()


@contextmanager
def pinned(memory: torch.Tensor, copies: Copies) -> Iterator[None]:
    """On a GPU, `memory` is page-locked, so that copies run while the host goes on."""
    if not isinstance(copies, CudaCopies):
        yield
        return
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(memory.data_ptr(), len(memory), 0)) == 0
    try:
        yield
    finally:
        copies.synchronize()
        runtime.cudaHostUnregister(memory.data_ptr())
