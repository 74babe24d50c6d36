"""The bound: the time that the bytes alone would take, on whichever way is the slowest.

What a pass moves is divided by what this machine was measured to give in the same run: weights that
the computing memory reads (a token's experts and every resident matrix), experts that cross the
bus, records that come from the drive, and the arithmetic, which prompts are bound by. The largest
of these times is the bound: everything else hidden behind it. No hit rate is assumed: what was
read and copied is what the ledger counted.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tierrun.bench.devices import bytes_per_token, measure_bandwidths
from tierrun.bench.io_bench import Bench
from tierrun.bench.io_plan import LEAST_PLACES, Case
from tierrun.bench.io_readers import obstacle
from tierrun.bench.io_sources import Source, stored_sources
from tierrun.io.errors import UsageError
from tierrun.io.reads import DEFAULT_DEPTH
from tierrun.io.store import Manifest
from tierrun.tiers.chunking import flops_per_token
from tierrun.tiers.ledger import Counters

_SIDE = 1024
_REPEATS = 3
_DRIVE_ROUNDS = 3


class Rates(NamedTuple):
    """What the machine gives: bytes per second of the computing memory, of copies to the device
    (from pinned memory) and of the drive, and FLOP per second of torch's own product."""

    memory: float
    upload: float
    drive: float
    flops: float


class Traffic(NamedTuple):
    """What a pass moves, in bytes, and computes, in FLOP."""

    memory: float
    bus: float
    drive: float
    flops: float


class Bound(NamedTuple):
    """Seconds that a pass takes at least, and what makes it so."""

    seconds: float
    by: str


def bound_of(traffic: Traffic, rates: Rates) -> Bound:
    """Of the four times the largest; of something."""
    times = {
        "memory": traffic.memory / rates.memory,
        "bus": traffic.bus / rates.upload,
        "drive": traffic.drive / rates.drive,
        "arithmetic": traffic.flops / rates.flops,
    }
    by = max(times, key=lambda name: times[name])
    return Bound(times[by], by)


def traffic_of(
    manifest: Manifest, vocabulary: int, tokens: int, passes: int, counters: Counters, device: str
) -> Traffic:
    """Of `tokens` that went through the model in `passes`, as the ledger counted them.

    Every pass reads the resident weights, and each expert that it wants once; what the device read
    over the bus, or had the CPU compute, its memory did not read.
    """
    elsewhere = counters.zero_copy_bytes + counters.computed_bytes
    read = passes * _resident_bytes(manifest) + counters.lookups * _mean_record(manifest)
    bus = counters.promoted_bytes + counters.zero_copy_bytes if device != "cpu" else 0
    return Traffic(
        max(0.0, read - elsewhere),
        bus,
        counters.read_bytes,
        tokens * flops_per_token(manifest, vocabulary),
    )


def _resident_bytes(manifest: Manifest) -> int:
    experts = sum(
        layer.top_k * manifest.class_of(i).nbytes for i, layer in enumerate(manifest.layers)
    )
    return bytes_per_token(manifest) - experts


def _mean_record(manifest: Manifest) -> float:
    """Bytes of an expert, as often as a token wants one of its size."""
    top_k = sum(layer.top_k for layer in manifest.layers)
    return (bytes_per_token(manifest) - _resident_bytes(manifest)) / top_k


def measure_rates(device: str, drive: float) -> Rates:
    """All of them, each for a moment, but for the `drive`'s."""
    bandwidths = measure_bandwidths(device)
    return Rates(bandwidths.memory, bandwidths.upload, drive, _flops(device))


def drive_bandwidth(directories: Sequence[Path], seconds: float) -> float:
    """Bytes per second of random reads of the store's largest records, as `bench io` measures them:
    past the page cache where that can be, as many at once as the engine issues. The best of a few.
    """
    sources = tuple(stored_sources(directories).values())
    if not sources:
        raise UsageError(f"{directories[0]} is not a store")
    nbytes = max(nbytes for source in sources for nbytes in source.records)
    direct = all(obstacle("direct", source.paths[0]) is None for source in sources)
    reader = "direct" if direct else "buffered"
    case = Case(sources, reader, "host", "random", nbytes, _depth(sources, nbytes))
    bench = Bench([case], None)
    rounds = range(_DRIVE_ROUNDS)
    return max(bench.measure(case, seconds / _DRIVE_ROUNDS, n).bandwidth for n in rounds)


def _depth(sources: Sequence[Source], nbytes: int) -> int:
    fewest = min(source.num_places(nbytes) for source in sources)
    return max(1, min(DEFAULT_DEPTH, fewest // LEAST_PLACES))


def _flops(device: str) -> float:
    """Of torch's product of large square matrices: fp16 on a GPU, fp32 on the CPU."""
    if device != "cpu":
        from tierrun.engine.gpu.rates import product_flops

        return product_flops(torch.device(device))
    x, best = torch.ones(_SIDE, _SIDE), float("inf")
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        torch.mm(x, x)
        best = min(best, time.perf_counter() - started)
    return 2 * _SIDE**3 / best
