"""The CPU's kernels on this machine: packed weights read per second, in several codecs.

    python -m tierrun.bench.kernels_host [--out $OUT/host.json]

One call computes several experts of one layer for every token (as the CPU lane does: each expert's
weights are read once a call); calls go through more memory than a cache holds. Threads are swept.
The yardstick is the rate at which as many of torch's threads sum up the same memory. What is shown
is the best of several calls, beside their median.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.table import Table

from tierrun.bench.random_weights import generator, matrix_bytes
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.gpu.layout import ExpertLayout
from tierrun.engine.kernels.geometry import Geometry, dense_geometry, packed_geometry
from tierrun.engine.kernels.host import HostExperts
from tierrun.engine.kernels.matmul import Operand
from tierrun.engine.kernels.matvec import Gate
from tierrun.io.extent import align_up

CODECS = ("bf16", "q8_0", "fp8_g128_f32", "q6_k", "q4_k", "q4_0", "mxfp4", "nvfp4", "q2_k")
TOKENS = (1, 4)
SECONDS = 0.1
"""Of calls, for each number."""


class Layer(NamedTuple):
    """Experts [hidden, inner] of `codec`, `records` of them side by side in memory."""

    layout: ExpertLayout
    records: list[torch.Tensor]
    packed_bytes: int


class Result(NamedTuple):
    """Bytes of packed weights per second: the best call and the median one."""

    codec: str
    tokens: int
    threads: int
    best: float
    median: float


def geometry_of(codec: str, shape: tuple[int, int]) -> Geometry:
    """The matrix [out, in] in a codec, a dense one or a packed one."""
    if codec in DTYPES:
        return dense_geometry(codec, shape)
    return packed_geometry(find_codec(codec), shape)


def make_layer(codec: str, hidden: int, inner: int, memory: torch.Tensor) -> Layer:
    """A layer that fills `memory` (uint8) with copies of one random record."""
    shapes = ((2 * inner, hidden), (hidden, inner))
    first, down = (matrix_bytes(codec, shape, generator(1)) for shape in shapes)
    offset = align_up(len(first), 64)
    record = torch.zeros(align_up(offset + len(down)), dtype=torch.uint8)
    record[: len(first)], record[offset : offset + len(down)] = first, down
    records = list(memory[: len(memory) // len(record) * len(record)].view(-1, len(record)))
    for place in records:
        place.copy_(record)
    operands = [Operand(geometry_of(codec, shape)) for shape in shapes]
    layout = ExpertLayout((operands[0],), operands[1]._replace(offset=offset), Gate("silu"))
    return Layer(layout, records, len(first) + len(down))


def calls(layer: Layer, threads: int, tokens: int, experts: int) -> Iterator[Callable[[], None]]:
    """One call after another, each with other records."""
    computer = HostExperts(layer.layout, threads)
    hidden = layer.layout.first[0].matrix[1]
    x = generator(2).standard_normal((tokens, hidden), dtype=np.float32) / np.float32(32)
    token, which = (index.flatten() for index in np.indices((tokens, experts)))
    out, first = np.empty((tokens * experts, hidden), np.float32), 0
    while True:
        some = [layer.records[(first + i) % len(layer.records)] for i in range(experts)]
        yield partial(computer.compute, some, x, token, which, out)
        first += experts


def timed(work: Iterator[Callable[[], None]]) -> list[float]:
    """Seconds of each call, sorted."""
    next(work)()
    end = time.perf_counter() + SECONDS
    found: list[float] = []
    while time.perf_counter() < end or len(found) < 3:
        call = next(work)
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return sorted(found)


def read_rate(memory: torch.Tensor, threads: int) -> float:
    """Bytes per second of a sum over `memory`."""
    before, numbers = torch.get_num_threads(), memory.view(torch.float32)
    torch.set_num_threads(threads)
    seconds = timed(itertools.repeat(partial(_sum, numbers)))
    torch.set_num_threads(before)
    return len(memory) / seconds[0]


def _sum(numbers: torch.Tensor) -> None:
    numbers.sum()


def swept(most: int) -> list[int]:
    """1, 2, 4 … and `most` threads."""
    return sorted({1 << i for i in range(most.bit_length())} | {most})


def measure(codec: str, counts: list[int], layer: Layer, experts: int) -> Iterator[Result]:
    """Every number of tokens and of threads."""
    for tokens in TOKENS:
        for threads in counts:
            seconds = timed(calls(layer, threads, tokens, experts))
            read = experts * layer.packed_bytes
            yield Result(
                codec, tokens, threads, read / seconds[0], read / seconds[len(seconds) // 2]
            )


def table(results: list[Result], counts: list[int], rates: list[float]) -> Table:
    """One line for each codec and number of tokens."""
    made = Table(title="GB/s of packed weights, best (median), by threads")
    for name in ("codec", "tokens", *map(str, counts)):
        made.add_column(name, justify="left" if name == "codec" else "right")
    made.add_row("torch's sum", "", *(f"{rate / 1e9:.1f}" for rate in rates))
    for start in range(0, len(results), len(counts)):
        some = results[start : start + len(counts)]
        numbers = (f"{r.best / 1e9:.1f} ({r.median / 1e9:.1f})" for r in some)
        made.add_row(some[0].codec, str(some[0].tokens), *numbers)
    return made


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
    hidden: Annotated[int, typer.Option(help="Inputs of an expert.")] = 2048,
    inner: Annotated[int, typer.Option(help="Its inner width.")] = 512,
    experts: Annotated[int, typer.Option(help="Experts of a call.")] = 8,
    mib: Annotated[int, typer.Option(help="Memory that calls go through.")] = 512,
) -> None:
    """Time the CPU's kernels on this machine."""
    counts = swept(len(os.sched_getaffinity(0)))
    memory = torch.zeros(mib << 20, dtype=torch.uint8)
    rates = [read_rate(memory, threads) for threads in counts]
    results: list[Result] = []
    for codec in CODECS:
        layer = make_layer(codec, hidden, inner, memory)
        results += measure(codec, counts, layer, experts)
    open_console().print(table(results, counts, rates))
    found: dict[str, Any] = {
        "shape": {"hidden": hidden, "inner": inner, "experts": experts},
        "read_bytes_per_second": dict(zip(counts, rates, strict=True)),
        "results": [result._asdict() for result in results],
    }
    emit(document("kernels_host", found), out)


if __name__ == "__main__":
    run_script(main)
