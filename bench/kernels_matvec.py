"""Ways of cutting up the decode kernels' products on this GPU: which is the fastest?

    python -m tierrun.bench.kernels_matvec

Each product of one layer of a model, over experts that rotate through more memory than the L2 cache
has, as `tierrun bench kernels` times them. Prints the best of each; everything goes to
$OUT/matvec.json. For whoever changes a kernel, or has a GPU that nobody has tuned for.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from tierrun.bench.kernels_gpu import gpu_work
from tierrun.bench.kernels_layers import geometry
from tierrun.bench.random_weights import matrix_nbytes
from tierrun.bench.timed import rate
from tierrun.engine.kernels import matvec
from tierrun.engine.kernels.geometry import Geometry, is_dense
from tierrun.engine.kernels.matvec import Config, Gate
from tierrun.io.extent import align_up

CODECS = ("bf16", "q8_0", "q4_k", "mxfp4", "fp8_g128_f32", "q6_k", "q2_k", "iq4_xs")
PACKED = (Config(32, 4), Config(16, 4), Config(8, 4), Config(16, 2), Config(8, 2), Config(16, 8))
DENSE = (
    *(Config(4, 4, 128), Config(8, 4, 128), Config(8, 4, 64), Config(16, 4, 32)),
    *(Config(2, 4, 128), Config(4, 2, 64)),
)
LAUNCHES = 32
"""Launches of a graph, each with other experts."""
SECONDS = 0.02
"""Of each number."""


class Shape(NamedTuple):
    """A layer's experts."""

    hidden: int
    intermediate: int
    top_k: int
    gate: Gate


SILU = Gate("silu")
SHAPES = (
    Shape(2048, 768, 8, SILU),
    Shape(2048, 512, 8, SILU),
    Shape(2880, 2880, 4, Gate("gpt_oss", True, 1.702, 7.0)),
    Shape(6144, 2048, 8, SILU),
)
LINEAR = ((4096, 2048), (2048, 4096), (151936, 2048))


class Case(NamedTuple):
    """One product: `tokens` 0 is that of `top_k` experts for one token, else a resident linear."""

    codec: str
    rows: int
    columns: int
    gate: Gate
    top_k: int
    tokens: int = 0

    @property
    def geometry(self) -> Geometry:
        return geometry(self.codec, (self.rows, self.columns))

    @property
    def nbytes(self) -> int:
        """Of one matrix."""
        return matrix_nbytes(self.codec, (self.rows, self.columns))

    @property
    def configs(self) -> tuple[Config, ...]:
        return DENSE if is_dense(self.geometry) else PACKED

    @property
    def label(self) -> str:
        name = f"linear T={self.tokens}" if self.tokens else f"{self.gate.kind} x{self.top_k}"
        return f"{self.codec:13} {self.rows:6} x {self.columns:4}  {name:12}"


def cases() -> Iterator[Case]:
    """All that is timed."""
    for hidden, intermediate, top_k, gate in SHAPES:
        for codec in CODECS:
            yield Case(codec, 2 * intermediate, hidden, gate, top_k)
            yield Case(codec, hidden, intermediate, Gate("none"), top_k)
    for rows, columns in LINEAR:
        for codec in CODECS[:3]:
            for tokens in (1, 8):
                yield Case(codec, rows, columns, Gate("none"), 1, tokens)


def launch(
    case: Case, config: Config, memory: torch.Tensor, slots: torch.Tensor, x: torch.Tensor
) -> None:
    """Compute `case` once; its experts are at `slots` in `memory`."""
    if case.tokens:
        data = memory[int(slots[0]) :][: case.nbytes] if len(slots) else memory
        matvec.linear(x, data, case.geometry, config=config)
    else:
        k = case.top_k if case.gate.kind != "none" else 1
        matvec.grouped(x, memory, slots, k, case.geometry, 0, gate=case.gate, config=config)


def inputs_of(case: Case) -> torch.Tensor:
    rows = case.tokens or (1 if case.gate.kind != "none" else case.top_k)
    return torch.randn(rows, case.columns, device="cuda")


def compile_all(work: list[tuple[Case, Config]]) -> None:
    """Put the kernels of `work` into Triton's cache: launch them on nothing."""
    for case, config in work:
        size = case.nbytes if case.tokens else 64
        memory = torch.zeros(size, dtype=torch.uint8, device="cuda")
        slots = torch.full((0 if case.tokens else case.top_k,), -1, device="cuda")
        launch(case, config, memory, slots, inputs_of(case))
    torch.cuda.synchronize()


def time_case(case: Case, config: Config, memory: torch.Tensor) -> float:
    """Seconds of one launch of `case`, on average over several with other experts each."""
    x, stride = inputs_of(case), align_up(case.nbytes, 4096)
    records = len(memory) // stride
    count = min(LAUNCHES, max(2, records // case.top_k))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(max(records, count * case.top_k), generator=generator) % records
    slots = (order[: count * case.top_k] * stride).view(count, case.top_k)
    some = list(slots.to("cuda")) if not case.tokens else list(slots)
    work = gpu_work(lambda i: launch(case, config, memory, some[i], x), count, memory.device)
    return 1 / rate(work, SECONDS)


def copy_bandwidth(memory: torch.Tensor) -> float:
    """Bytes per second of a copy within the device, read and written."""
    first, second = memory.view(2, -1)
    return len(memory) * rate(gpu_work(lambda i: first.copy_(second), 1, memory.device), SECONDS)


def split(work: list[tuple[Case, Config]], parts: int) -> Iterable[list[tuple[Case, Config]]]:
    return (work[part::parts] for part in range(parts))


def main() -> None:
    started = time.perf_counter()
    work = [(case, config) for case in cases() for config in case.configs]
    workers = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_all, split(work, 4 * workers)))
    print(f"{torch.cuda.get_device_name()}: compiled in {time.perf_counter() - started:.0f} s")
    measure()
    print(f"{time.perf_counter() - started:.0f} s in all")


def measure() -> None:
    memory = torch.randint(0, 120, (3 << 30,), dtype=torch.uint8, device="cuda")
    copied = copy_bandwidth(memory)
    print(f"copy {copied / 1e9:.0f} GB/s")
    results = []
    for case in cases():
        times = {config: time_case(case, config, memory) for config in case.configs}
        best = min(times, key=lambda config: times[config])
        rate = case.nbytes * case.top_k / times[best]
        default = matvec.choose_config(case.geometry, case.top_k, case.gate.kind != "none")
        all_times = "  ".join(f"{tuple(c)}:{t * 1e6:.1f}" for c, t in times.items())
        print(
            f"{case.label} {times[best] * 1e6:7.1f} us {rate / 1e9:5.0f} GB/s "
            f"{rate / copied:4.0%}  {tuple(best)}  [{all_times}]",
            flush=True,
        )
        results.append(
            {
                "case": case._asdict(),
                "best": best,
                "default": default,
                "bytes_per_second": rate,
                "share_of_copy": rate / copied,
                "microseconds": [(config, t * 1e6) for config, t in times.items()],
            }
        )
    document = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_second": copied,
        "cases": results,
    }
    path = Path(os.environ.get("OUT", ".")) / "matvec.json"
    path.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
