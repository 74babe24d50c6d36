"""The CPU's int8 kernels beside those in fp32: weights per second of each, and what each rounds.

    python -m tierrun.bench.kernels_int8 [--out int8.json]

A call computes some experts of one layer for every token, as a decode step does. `cached`: always
the same few experts, which fit into a core's caches; `memory`: calls go through much more. Both
kinds of kernel, and a sum by torch over the same memory as a yardstick, take turns; what is shown
is the best of the rounds. Errors are root mean squares, relative to the exact product's (fp64).
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.table import Table
from torch.nn.functional import silu

from tierrun.bench.random_weights import generator, matrix_bytes
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.gpu.layout import ExpertLayout
from tierrun.engine.kernels.geometry import packed_geometry
from tierrun.engine.kernels.host import HostExperts, supports_int8
from tierrun.engine.kernels.matmul import Operand
from tierrun.engine.kernels.matvec import Gate
from tierrun.io.extent import align_up

CODECS = (
    *("q4_k", "q4_0", "mxfp4", "q8_0", "q6_k", "q5_k", "q3_k", "q2_k", "q4_1", "q5_0", "q5_1"),
    *("iq4_nl", "iq4_xs", "nvfp4", "int4_g128_bf16", "int4z_g128_f16", "int8_row_f32"),
    "fp8_g128_f32",
)
CACHED_EXPERTS = 1
SECONDS = 0.06
"""Of calls, for each number and round."""


class Layer(NamedTuple):
    """Experts of `codec` side by side in memory; `weights` and `nbytes` are one expert's."""

    layout: ExpertLayout
    records: list[torch.Tensor]
    exact: tuple[NDArray[np.float64], NDArray[np.float64]]
    weights: int
    nbytes: int


class Rate(NamedTuple):
    """Of the best call: weights and packed bytes per second; and of torch's sum, bytes."""

    codec: str
    path: str
    place: str
    tokens: int
    threads: int
    weights_per_second: float
    bytes_per_second: float
    read_bytes_per_second: float


def make_layer(codec: str, hidden: int, inner: int, memory: torch.Tensor) -> Layer:
    """A layer that fills `memory` (uint8) with copies of one random record."""
    shapes = ((2 * inner, hidden), (hidden, inner))
    found = find_codec(codec)
    parts = [matrix_bytes(codec, shape, generator(1, i)) for i, shape in enumerate(shapes)]
    offset = align_up(len(parts[0]), 64)
    record = torch.zeros(align_up(offset + len(parts[1])), dtype=torch.uint8)
    record[: len(parts[0])], record[offset : offset + len(parts[1])] = parts
    records = list(memory[: len(memory) // len(record) * len(record)].view(-1, len(record)))
    for place in records:
        place.copy_(record)
    first, down = (Operand(packed_geometry(found, shape)) for shape in shapes)
    exact = [
        Packed.over(part, found, shape).dense().double().numpy()
        for part, shape in zip(parts, shapes, strict=True)
    ]
    layout = ExpertLayout((first,), down._replace(offset=offset), Gate("silu"))
    return Layer(layout, records, (exact[0], exact[1]), 3 * hidden * inner, sum(map(len, parts)))


def calls(
    layer: Layer, computer: HostExperts, tokens: int, experts: int, records: int
) -> Iterator[Callable[[], None]]:
    """One call after another, through the first `records` of the layer's."""
    x = inputs(layer, tokens)
    token, which = (index.flatten() for index in np.indices((tokens, experts)))
    out, first = np.empty((tokens * experts, x.shape[1]), np.float32), 0
    while True:
        some = [layer.records[(first + i) % records] for i in range(experts)]
        yield partial(computer.compute, some, x, token, which, out)
        first += experts


def inputs(layer: Layer, tokens: int) -> NDArray[np.float32]:
    """Normal activations, [tokens, hidden]."""
    hidden = layer.layout.first[0].matrix[1]
    return generator(2).standard_normal((tokens, hidden), dtype=np.float32)


def best(work: Iterator[Callable[[], None]]) -> float:
    """Seconds of the fastest call."""
    next(work)()
    end, found = time.perf_counter() + SECONDS, [float("inf")]
    while time.perf_counter() < end or len(found) < 4:
        call = next(work)
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def read_seconds(memory: torch.Tensor, threads: int) -> float:
    """Of a sum over `memory`."""
    before, numbers = torch.get_num_threads(), memory.view(torch.float32)
    torch.set_num_threads(threads)
    started = time.perf_counter()
    numbers.sum()
    seconds = time.perf_counter() - started
    torch.set_num_threads(before)
    return seconds


def errors(layer: Layer, computer: HostExperts) -> float:
    """Of an expert's output, relative."""
    x = inputs(layer, 8)
    out = np.empty((len(x), x.shape[1]), np.float32)
    computer.compute(layer.records[:1], x, np.arange(len(x)), np.zeros(len(x), np.int64), out)
    gate, up = torch.from_numpy(x.astype(np.float64) @ layer.exact[0].T).chunk(2, dim=1)
    wanted = (silu(gate) * up).numpy() @ layer.exact[1].T
    return float(np.sqrt(((out - wanted) ** 2).mean() / (wanted**2).mean()))


def measure(
    codec: str,
    layer: Layer,
    memory: torch.Tensor,
    tokens: list[int],
    counts: list[int],
    rounds: int,
) -> tuple[list[Rate], dict[str, float]]:
    """All rates of a codec, and the errors of its paths."""
    rates, wrong = [], {}
    names = ["fp32", "int8"] if supports_int8(layer.layout) else ["fp32"]
    for threads in counts:
        paths = {name: HostExperts(layer.layout, threads, int8=name == "int8") for name in names}
        wrong = {name: errors(layer, computer) for name, computer in paths.items()}
        for place, experts in (("cached", CACHED_EXPERTS), ("memory", 8)):
            records = CACHED_EXPERTS if place == "cached" else len(layer.records)
            for count in tokens:
                taken = dict.fromkeys(names, float("inf"))
                reading = float("inf")
                for _ in range(rounds):
                    reading = min(reading, read_seconds(memory, threads))
                    for name, computer in paths.items():
                        work = calls(layer, computer, count, experts, records)
                        taken[name] = min(taken[name], best(work))
                for name, seconds in taken.items():
                    weights, nbytes = experts * layer.weights, experts * layer.nbytes
                    speed = (weights / seconds, nbytes / seconds, len(memory) / reading)
                    rates.append(Rate(codec, name, place, count, threads, *speed))
    return rates, wrong


def table(rates: list[Rate], wrong: dict[str, dict[str, float]]) -> Table:
    """One line for each codec, path and number of tokens and threads."""
    made = Table(title="Packed weights of experts: 10⁹ weights/s (GB/s), and relative errors")
    for name in ("codec", "path", "tokens", "threads", "cached", "memory", "of reading", "error"):
        made.add_column(name, justify="left" if name in ("codec", "path") else "right")
    found = {rate[:5]: rate for rate in rates}
    for rate in rates:
        if rate.place == "memory":
            cached = found[rate.codec, rate.path, "cached", rate.tokens, rate.threads]
            speeds = (
                f"{r.weights_per_second / 1e9:.1f} ({r.bytes_per_second / 1e9:.1f})"
                for r in (cached, rate)
            )
            share = rate.bytes_per_second / rate.read_bytes_per_second
            made.add_row(
                *(rate.codec, rate.path, str(rate.tokens), str(rate.threads), *speeds),
                *(f"{share:.0%}", f"{wrong[rate.codec][rate.path]:.1e}"),
            )
    return made


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
    codecs: Annotated[str, typer.Option(help="Which codecs, by commas.")] = ",".join(CODECS),
    tokens: Annotated[str, typer.Option(help="Tokens of a call, by commas.")] = "1,4",
    threads: Annotated[str, typer.Option(help="Threads; 1 and all by default.")] = "",
    hidden: Annotated[int, typer.Option(help="Inputs of an expert.")] = 2048,
    inner: Annotated[int, typer.Option(help="Its inner width.")] = 768,
    mib: Annotated[int, typer.Option(help="Memory that calls go through.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Times that all take their turn.")] = 3,
) -> None:
    """Time and check the CPU's kernels on this machine."""
    cores = len(os.sched_getaffinity(0))
    counts = [int(n) for n in threads.split(",")] if threads else sorted({1, cores})
    memory = torch.zeros(mib << 20, dtype=torch.uint8)
    rates: list[Rate] = []
    wrong: dict[str, dict[str, float]] = {}
    for codec in codecs.split(","):
        layer = make_layer(codec, hidden, inner, memory)
        numbers = [int(n) for n in tokens.split(",")]
        more, wrong[codec] = measure(codec, layer, memory, numbers, counts, rounds)
        rates += more
    open_console().print(table(rates, wrong))
    found: dict[str, Any] = {
        "shape": {"hidden": hidden, "inner": inner, "memory_bytes": len(memory)},
        "relative_errors": wrong,
        "results": [rate._asdict() for rate in rates],
    }
    emit(document("kernels_int8", found), out)


if __name__ == "__main__":
    run_script(main)
