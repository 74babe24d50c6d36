"""Launch parameters of prefill's matrix products on a GPU: which are the fastest?

    python -m tierrun.bench.kernels_matmul [--out $OUT/matmul.json]

2048 tokens through resident matrices and through the experts of one layer (both products, tokens
routed at random), in several ways each, as `tierrun bench kernels` times them. The yardstick is the
rate of an 8192³ product of torch's in bf16, measured in the same run; shares are of it. Weights are
copied so often that no cache holds them. For whoever changes a kernel, or has a GPU that nobody has
tuned for.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table

from tierrun.bench.kernels_gpu import gpu_work
from tierrun.bench.kernels_layers import LAYERS, Layer, geometry, parse_layer
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.bench.timed import rate
from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.codecs.planes import packed_bytes, planes
from tierrun.engine.kernels import matmul
from tierrun.engine.kernels.matmul import Launch, Operand
from tierrun.engine.kernels.matvec import Gate
from tierrun.io.errors import UsageError
from tierrun.io.extent import align_up

TOKENS = 2048
AIM = 0.35
"""Of the yardstick."""

TIMED = ("bf16", "q8_0", "q4_k", "mxfp4", "fp8_g128_f32", "q6_k", "q5_k")

PACKED = {
    64: (Launch(128, 64, 8, 3), Launch(128, 64, 8, 3, 80)),
    128: (Launch(128, 64, 8, 3, 128), Launch(128, 64, 8, 3), Launch(64, 64, 4, 3)),
    256: (Launch(128, 64, 8, 3), Launch(128, 64, 8, 2)),
}
DENSE = {
    64: (Launch(128, 64, 4, 4), Launch(64, 64, 4, 4)),
    128: (Launch(128, 64, 8, 4), Launch(128, 64, 8, 3)),
}
"""Tokens of a tile → launches tried, the checked-in one first."""


MEASURED = (
    *(parse_layer(shape) for shape in ("4096x14336", "14336x4096")),
    *(LAYERS[name] for name in ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3.6-35b-a3b")),
)
SECONDS = 0.05
"""Of each number."""


class Case(NamedTuple):
    """One way of computing one layer in one codec."""

    layer: Layer
    codec: str
    block: int
    launch: Launch


class Result(NamedTuple):
    """Seconds, and what is made of them."""

    case: Case
    seconds: float
    rate: float
    share: float


def cases() -> Iterator[Case]:
    """All that is tried."""
    for layer, codec in itertools.product(MEASURED, TIMED):
        rows = TOKENS * layer.top_k / layer.experts if layer.experts else TOKENS
        tried = DENSE if codec in DTYPES else PACKED
        blocks = ((64, 128) if rows <= 256 else (128,)) if layer.experts else (128, matmul.WIDE)
        for block in blocks:
            yield from (Case(layer, codec, block, launch) for launch in tried.get(block, ()))


def filled(codec: str, shape: tuple[int, int]) -> torch.Tensor:
    """Bytes of a matrix made on the device: random codes, all scales the same; small numbers."""
    if codec in DTYPES:
        values = torch.randn(shape, device="cuda", dtype=DTYPES[codec]) / 64
        return values.flatten().view(torch.uint8)
    found = find_codec(codec)
    data = torch.full((packed_bytes(found, shape),), 0x2C, dtype=torch.uint8, device="cuda")
    for plane in planes(found, *shape):
        if plane.width:
            codes = data[plane.offset : plane.offset + plane.nbytes]
            codes.random_(0, 120 if found.book == "e4m3" else 256)
    return data


def prepare(case: Case, tokens: int, copies: int) -> list[Callable[[], object]]:
    """The work of `case`, on so many copies of the weights."""
    matmul.LAUNCHES[case.codec not in DTYPES, case.block] = case.launch
    if case.layer.experts:
        return _experts(case, tokens, copies)
    shape = case.layer.inner, case.layer.hidden
    described, data = geometry(case.codec, shape), filled(case.codec, shape)
    x = torch.randn(tokens, case.layer.hidden, device="cuda")
    weights = [data.clone() for _ in range(copies)]
    return [partial(matmul.linear, x, w, described, block=case.block) for w in weights]


def _experts(case: Case, tokens: int, copies: int) -> list[Callable[[], object]]:
    _, hidden, inner, experts, top_k = case.layer
    gate_up, down = (
        (geometry(case.codec, shape), filled(case.codec, shape))
        for shape in ((2 * inner, hidden), (hidden, inner))
    )
    at = align_up(gate_up[1].numel(), 64)
    record = torch.zeros(align_up(at + down[1].numel()), dtype=torch.uint8, device="cuda")
    record[: gate_up[1].numel()], record[at : at + down[1].numel()] = gate_up[1], down[1]
    slab = record.repeat(experts if copies else 1)
    slots = torch.arange(experts, device="cuda") * (len(record) if copies else 0)
    x = torch.randn(tokens, hidden, device="cuda")
    top = torch.rand(tokens, experts, device="cuda").topk(top_k, dim=1).indices
    grouping = matmul.group(top, experts)._replace(block=case.block)
    tiles, y = grouping.tiles(range(experts)), torch.empty(tokens * top_k, hidden, device="cuda")

    def work() -> None:
        arranged = matmul.arrange(x, gate_up[0])
        h = matmul.hidden(grouping, down[0])
        place = (grouping, tiles, slab, slots)
        matmul.gate_up(arranged, *place, Operand(gate_up[0]), Gate("silu"), down[0], h)
        matmul.down(h, *place, Operand(down[0], at), y)

    return [work]


def compile_one(case: Case) -> None:
    """Compile what `case` needs into Triton's cache, by running it on next to nothing."""
    for work in prepare(case, 256, copies=0 if case.layer.experts else 1):
        work()
    torch.cuda.synchronize()


def timed(works: Sequence[Callable[[], object]]) -> float:
    """Seconds of one piece of work, taken by turns."""
    device = torch.device("cuda", torch.cuda.current_device())
    return 1 / rate(gpu_work(lambda number: works[number](), len(works), device), SECONDS)


def yardstick() -> float:
    """FLOP/s of torch's product in bf16, 8192³."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / timed([lambda: a @ b])


def best(results: Sequence[Result]) -> list[Result]:
    """The fastest case of each layer and codec."""
    fastest: dict[tuple[Layer, str], Result] = {}
    for result in results:
        key = result.case.layer, result.case.codec
        if key not in fastest or result.seconds < fastest[key].seconds:
            fastest[key] = result
    return list(fastest.values())


def table(results: Sequence[Result], rate: float) -> Table:
    """One line for each layer and codec."""
    made = Table(title=f"{TOKENS} tokens; torch's bf16 at 8192³: {rate / 1e12:.0f} TFLOP/s")
    for name in (
        "layer",
        "codec",
        "tile",
        "rows inputs warps stages registers",
        "ms",
        "TFLOP/s",
        "share",
    ):
        made.add_column(name, justify="left" if name in ("layer", "codec") else "right")
    for case, seconds, flops, share in results:
        made.add_row(
            case.layer.name,
            case.codec,
            str(case.block),
            " ".join(str(value or "-") for value in case.launch),
            f"{seconds * 1e3:.3f}",
            f"{flops / 1e12:.0f}",
            f"{share:.0%}{'' if share >= AIM else ' <'}",
        )
    return made


def _time_all(yard: float) -> list[Result]:
    results = []
    for case in cases():
        seconds = timed(prepare(case, TOKENS, copies=4))
        flops = case.layer.flops(TOKENS) / seconds
        results.append(Result(case, seconds, flops, flops / yard))
        torch.cuda.empty_cache()
    return results


def _described(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "layer": case.layer._asdict(),
        "codec": case.codec,
        "block": case.block,
        "launch": case.launch._asdict(),
        "seconds": result.seconds,
        "tflops": result.rate / 1e12,
        "share": result.share,
    }


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile.")] = 12,
) -> None:
    """Time prefill's matrix products on this machine's GPU in several ways."""
    if not torch.cuda.is_available():
        raise UsageError("there is no GPU here")
    with ProcessPoolExecutor(min(workers, os.cpu_count() or 1), get_context("spawn")) as pool:
        list(pool.map(compile_one, cases()))
    yard = yardstick()
    results = _time_all(yard)
    open_console().print(table(best(results), yard))
    found = {
        "yardstick_tflops": yard / 1e12,
        "best": [_described(result) for result in best(results)],
        "all": [_described(result) for result in results],
    }
    where = out or (Path(os.environ["OUT"]) / "matmul.json" if "OUT" in os.environ else None)
    emit(document("kernels_matmul", found), where)


if __name__ == "__main__":
    run_script(main)
