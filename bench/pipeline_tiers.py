"""The engine's own tiers and queues without a model, for `tierrun bench pipeline`.

A path begins where the experts lie and ends where they would be computed: from the drive to RAM,
from RAM to VRAM, or all the way. Each is opened with tiers of its own sizes: small where experts
only pass through, so that the next time they have to come again.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import torch

from tierrun.engine.backend import chosen_reader, open_queue
from tierrun.engine.options import Options
from tierrun.io.store import Store
from tierrun.tiers.budget import Budget
from tierrun.tiers.copies import Barrier, Copies, Copy, CudaCopies, HostCopies, Pairs
from tierrun.tiers.ledger import Ledger
from tierrun.tiers.placement import Placement
from tierrun.tiers.policy import make_policy
from tierrun.tiers.residency import Residency
from tierrun.tiers.setup import make_device_tiers, make_tiers, prefill_window
from tierrun.tiers.slottable import InRam
from tierrun.tiers.vram import VramTier


class PipelinePath(StrEnum):
    """What is measured, end to end."""

    READ = "NVMe → RAM"
    COPY = "RAM → VRAM"
    BOTH = "NVMe → RAM → VRAM"


class TimedCopies:
    """Copies that say how long the host was blocked by them: `waited` seconds."""

    def __init__(self, copies: Copies) -> None:
        self._copies, self.waited = copies, 0.0

    def to_device(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        return _TimedCopy(self._copies.to_device(pairs), self)

    def to_host(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        return _TimedCopy(self._copies.to_host(pairs), self)

    def aside(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        return _TimedCopy(self._copies.aside(pairs), self)

    def ready(self) -> None:
        """See `Copies`."""
        self._copies.ready()

    def computed(self) -> Barrier:
        """See `Copies`."""
        return self._copies.computed()

    def is_computing(self) -> bool:
        """See `Copies`."""
        return self._copies.is_computing()

    def synchronize(self) -> None:
        """See `Copies`."""
        started = time.perf_counter()
        self._copies.synchronize()
        self.waited += time.perf_counter() - started


class _TimedCopy:
    def __init__(self, copy: Copy, owner: TimedCopies) -> None:
        self._copy, self._owner = copy, owner

    def wait(self) -> float:
        started = time.perf_counter()
        seconds = self._copy.wait()
        self._owner.waited += time.perf_counter() - started
        return seconds

    def is_done(self) -> bool:
        return self._copy.is_done()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the tiers that experts pass through, and of all experts that are asked for."""

    vram: int
    ram: int
    working_set: int

    def warm(self, path: PipelinePath) -> int:
        """Where experts come from RAM it holds them all, and a tenth more for the odd extent."""
        return max(self.ram, self.working_set * 11 // 10) if path is PipelinePath.COPY else self.ram


@dataclass(frozen=True, slots=True)
class Tiers:
    """An opened path; without `vram` it ends in RAM, `window` reads ahead in prefill."""

    path: PipelinePath
    store: Store
    residency: Residency
    window: int
    vram: VramTier | None
    copies: TimedCopies

    @property
    def ledger(self) -> Ledger:
        return self.residency.placement.ledger


@contextmanager
def open_path(
    path: PipelinePath, store: Store, options: Options, sizes: Sizes, device: torch.device
) -> Iterator[Tiers]:
    """The tiers of `path`, as an engine with `options` would make them.

    Raises:
        TierrunError: a tier is too small or refused, or the store cannot be read.
    """
    manifest, ram = store.manifest, Budget(sizes.warm(path), "for this path")
    policy, ledger = make_policy(options.policy, manifest.num_experts), Ledger()
    queue = open_queue(store, chosen_reader(store, options), options)
    try:
        if path is PipelinePath.READ:
            hot, warm = make_tiers(manifest, Budget(0, "none"), ram)
            residency = Residency(Placement(manifest, hot, warm, policy, queue, ledger))
            window = prefill_window(store, warm, options.depth)
            yield Tiers(path, store, residency, window, None, TimedCopies(HostCopies()))
            return
        vram = Budget(sizes.vram, "for this path")
        tiers = make_device_tiers(manifest, vram, ram, device, strict=options.strict)
        on_gpu = device.type == "cuda"
        copies = TimedCopies(CudaCopies(device) if on_gpu else HostCopies())
        placement = Placement(manifest, tiers.none, tiers.warm, policy, queue, ledger)
        residency = Residency(placement)
        window = prefill_window(store, tiers.warm, options.depth)
        top = VramTier(residency, tiers.hot, copies, window, InRam.HIDDEN)
        try:
            yield Tiers(path, store, residency, window, top, copies)
        finally:
            top.close()
            queue.close()  # before the memory that its reads fill
            tiers.warm.slab.release()
    finally:
        queue.close()
