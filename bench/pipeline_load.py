"""What goes through the pipeline: layers' experts as a model asks for them, without the model.

`decode` asks for the top-k experts of one layer after the other, and waits for them before the next
layer, as their products would; `prefill` streams all of a layer's experts, reads and copies running
ahead. Experts come in an order in which each is asked for once before any is asked for again.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tierrun.bench.pipeline_tiers import PipelinePath, Tiers
from tierrun.io.store import Manifest

LOADS = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Of every layer the experts that are asked for, in their order, and what one token takes."""

    layers: tuple[tuple[int, ...], ...]
    top_k: tuple[int, ...]
    nbytes: int

    @staticmethod
    def of(manifest: Manifest, nbytes: int) -> "WorkingSet":
        """About `nbytes` of experts, as many of each layer; at least what a token takes, and one
        more."""
        sizes = [manifest.class_of(layer).nbytes for layer in range(len(manifest.layers))]
        share = nbytes // sum(sizes)
        layers, chance = list[tuple[int, ...]](), random.Random(0)
        for layer in manifest.layers:
            count = min(len(layer.records), max(layer.top_k + 1, share))
            layers.append(tuple(chance.sample(range(len(layer.records)), count)))
        total = sum(size * len(layer) for size, layer in zip(sizes, layers, strict=True))
        top_k = tuple(layer.top_k for layer in manifest.layers)
        return WorkingSet(tuple(layers), top_k, total)


class Round(NamedTuple):
    """Some seconds of load: bytes that came to the end of the path, and where the time went.

    `reads` and `copies` are seconds in which the host was blocked by them, `host` all others; `hit`
    is the share of what was asked for that was there already.
    """

    bandwidth: float
    reads: float
    copies: float
    host: float
    hit: float


class Feeder:
    """Asks `tiers` for the experts of `working_set`."""

    def __init__(self, tiers: Tiers, working_set: WorkingSet) -> None:
        self._tiers, self._set = tiers, working_set
        self._step = dict.fromkeys(LOADS, 0)

    def warm_up(self) -> None:
        """Everything once: checksums are checked, and what stays in a tier is there."""
        self._pass("prefill")
        self._pass("prefill")

    def run(self, load: str, seconds: float) -> Round:
        """One round of `load`.

        Raises:
            ReadError, CorruptError: a read failed.
        """
        tiers, counters = self._tiers, self._tiers.ledger.counters
        tiers.copies.synchronize()
        before, blocked = tiers.ledger.snapshot(), tiers.copies.waited
        started = time.perf_counter()
        while True:
            self._pass(load)
            if time.perf_counter() - started >= seconds:
                break
        tiers.copies.synchronize()
        took = time.perf_counter() - started
        done = counters - before
        reads, copies = done.wait_seconds, tiers.copies.waited - blocked
        came = done.read_bytes if tiers.path is PipelinePath.READ else done.promoted_bytes
        hits = done.hot if tiers.vram is not None else done.warm
        return Round(
            came / took,
            reads / took,
            copies / took,
            max(0.0, took - reads - copies) / took,
            hits / max(1, done.lookups),
        )

    def _pass(self, load: str) -> None:
        """A token of `decode`, or one layer after the other of `prefill`."""
        vram, residency = self._tiers.vram, self._tiers.residency
        (residency if vram is None else vram).next_step()
        step = self._step[load]
        self._step[load] += 1
        for layer, experts in enumerate(self._set.layers):
            if load == "prefill":
                self._stream(layer, experts)
            else:
                self._fetch(layer, _turn(experts, step, self._set.top_k[layer]))

    def _fetch(self, layer: int, experts: Sequence[int]) -> None:
        if self._tiers.vram is None:
            with self._tiers.residency.lease(layer, experts) as lease:
                for _ in lease.arrivals():
                    pass
            return
        for _ in self._tiers.vram.fetch(layer, experts):
            self._tiers.copies.ready()
        self._tiers.copies.synchronize()

    def _stream(self, layer: int, experts: Sequence[int]) -> None:
        if self._tiers.vram is None:
            for _ in self._tiers.residency.stream(layer, experts, self._tiers.window):
                pass
            return
        for _ in self._tiers.vram.stream(layer, experts):
            self._tiers.copies.ready()


def _turn(experts: Sequence[int], step: int, count: int) -> list[int]:
    """The `step`-th `count` of `experts`, around and around."""
    first = step * count
    return [experts[(first + i) % len(experts)] for i in range(count)]
