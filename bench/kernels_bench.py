"""The weights that the cases of `tierrun bench kernels` share, and what each of them takes."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from tierrun.bench.cells import Cell, Metric
from tierrun.bench.copies_reading import reading, spread_out, whole_blocks
from tierrun.bench.kernels_calls import Calls
from tierrun.bench.kernels_cpu import cpu_calls, cpu_work, torch_threads
from tierrun.bench.kernels_gpu import gpu_calls, gpu_work
from tierrun.bench.kernels_layers import Layer, fill, make_record
from tierrun.bench.kernels_plan import CACHE, Case
from tierrun.bench.timed import rate, repeated
from tierrun.io.errors import DeviceError
from tierrun.tiers.memory import OrdinaryMemory

METRICS = (
    Metric("bandwidth", "GB/s", 1e-9, 1, True),
    Metric("of_memory", "% of memory", 100, 0, True),
    Metric("weights", "G weights/s", 1e-9, 1, True),
    Metric("flops", "TFLOP/s", 1e-12, 3, True),
    Metric("of_product", "% of product", 100, 0, True),
    Metric("seconds", "µs", 1e6, 0, False),
)

_CPU_SIDE, _GPU_SIDE = 2048, 8192
"""Of the square matrices whose product is the yardstick."""


class Yardstick(NamedTuple):
    """What the device does at best: bytes read and FLOP per second."""

    memory: float
    flops: float


class Bench:
    """`memory` of one device (uint8), full of the weights of one case after another.

    `gpu` says whose kernels are measured; the GPU's run interpreted in host memory.
    """

    def __init__(self, memory: torch.Tensor, *, gpu: bool) -> None:
        self._memory, self._device, self._gpu = memory, memory.device, gpu
        self._filled: tuple[Layer, str] | None = None

    def yardstick(self, threads: int | None, seconds: float) -> Yardstick:
        """Measured now; the weights are gone."""
        self._filled = None
        if self._gpu:
            return Yardstick(self._gpu_memory(seconds), self._gpu_product(seconds))
        with torch_threads(threads or 1):
            read = len(self._memory) * rate(reading(self._memory, threads or 1), seconds)
            a = torch.ones(_CPU_SIDE, _CPU_SIDE)
            out = torch.empty_like(a)
            product = rate(repeated(lambda: torch.mm(a, a, out=out)), seconds)
        return Yardstick(read, 2 * _CPU_SIDE**3 * product)

    def sample(self, case: Case, seconds: float, yardstick: Yardstick) -> dict[str, float]:
        """One round of `case`, by the names of `METRICS`.

        Raises:
            DeviceError: the GPU has not the memory.
        """
        try:
            calls, per_second = self._measured(case, seconds)
        except torch.OutOfMemoryError:
            raise DeviceError(
                f"{case.layer.name} with {case.tokens} tokens does not fit into the GPU's memory: "
                "choose fewer --tokens"
            ) from None
        bandwidth = calls.routed.read_bytes * per_second
        flops = calls.routed.flops * per_second
        return {
            "bandwidth": bandwidth,
            "of_memory": bandwidth / yardstick.memory,
            "weights": calls.routed.weights * per_second,
            "flops": flops,
            "of_product": flops / yardstick.flops,
            "seconds": 1 / per_second,
        }

    def _measured(self, case: Case, seconds: float) -> tuple[Calls, float]:
        """The calls of `case`, and how many a second."""
        if self._filled != (case.layer, case.codec):
            self._record = make_record(case.layer, case.codec)
            self._records = fill(self._memory, self._record)
            self._filled = case.layer, case.codec
        if self._gpu:
            calls, count = gpu_calls(self._record, self._records, case.tokens)
            return calls, rate(gpu_work(calls, count, self._device), seconds)
        record, records, threads = self._record, self._records, case.threads or 1
        if case.source == CACHE:
            record, records = record.alone, records[:1]
        with torch_threads(threads):
            calls = cpu_calls(case.kernel, record, records, case.tokens, threads)
            return calls, rate(cpu_work(calls), seconds)

    def _gpu_memory(self, seconds: float) -> float:
        """The better of reading all of it, and of copying one half to the other."""
        numbers = self._memory.view(torch.float32)
        first, second = self._memory.view(2, -1)
        ways: tuple[Callable[[], object], ...] = (numbers.sum, partial(first.copy_, second))
        return len(self._memory) * max(self._gpu_rate(way, seconds) for way in ways)

    def _gpu_product(self, seconds: float) -> float:
        shape = (_GPU_SIDE, _GPU_SIDE)
        a, b = (torch.randn(shape, device=self._device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * _GPU_SIDE**3 * self._gpu_rate(lambda: torch.mm(a, b, out=out), seconds)

    def _gpu_rate(self, go: Callable[[], object], seconds: float) -> float:
        return rate(gpu_work(lambda number: go(), 1, self._device), seconds)


@contextmanager
def open_bench(device: str, nbytes: int) -> Iterator[Bench]:
    """With so many bytes of weights on `device`, while it lasts.

    Raises:
        TierrunError: there is not so much memory.
    """
    nbytes = whole_blocks(nbytes)
    if device == "cpu":
        memory = OrdinaryMemory().allocate(nbytes)
        spread_out(memory)
        yield Bench(memory, gpu=False)
        return
    with torch.cuda.device(device):
        try:
            memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            raise DeviceError(f"{device} has no {nbytes >> 20} MiB free for weights") from None
        yield Bench(memory, gpu=True)
    torch.cuda.empty_cache()


class Found(NamedTuple):
    """The samples of all rounds: of cases, and of the yardsticks by threads."""

    cells: tuple[Cell, ...]
    yardsticks: dict[int | None, list[Yardstick]]


def measure_all(
    bench: Bench,
    cases: Sequence[Case],
    rounds: int,
    seconds: float,
    say: Callable[[int, Case], None],
) -> Found:
    """All `cases`, which are of one device, `rounds` times, and the yardsticks before each round.

    Raises:
        DeviceError: as `Bench.sample`.
    """
    samples = [defaultdict[str, list[float]](list) for _ in cases]
    yardsticks = defaultdict[int | None, list[Yardstick]](list)
    for number in range(rounds):
        for threads in dict.fromkeys(case.threads for case in cases):
            yardsticks[threads].append(bench.yardstick(threads, max(0.1, seconds)))
        for case, found in zip(cases, samples, strict=True):
            say(number, case)
            one = bench.sample(case, seconds, yardsticks[case.threads][-1])
            for name, value in one.items():
                found[name].append(value)
    cells = tuple(
        Cell(case.key(), {name: tuple(values) for name, values in found.items()})
        for case, found in zip(cases, samples, strict=True)
    )
    return Found(cells, dict(yardsticks))
