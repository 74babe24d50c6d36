"""The CPU's kernels: compiled ones with activations in int8 and in fp32, and those that expand
weights tile by tile."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from tierrun.bench.kernels_calls import Calls, Routed
from tierrun.bench.kernels_layers import Record, geometry, make_layout
from tierrun.bench.kernels_plan import EXPAND, FP32, INT8, Case
from tierrun.bench.timed import Work, repeated
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.weight import Weight, matrix_view
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.kernels.host import HostExperts, supported
from tierrun.engine.kernels.int8 import obstacle as int8_obstacle
from tierrun.engine.kernels.int8_linear import Int8Linear


def cpu_calls(
    kernel: str, record: Record, records: torch.Tensor, tokens: int, threads: int
) -> Calls:
    """Of `kernel`; what expands weights uses as many threads as torch has.

    Raises:
        ValueError: `obstacle` says why not.
    """
    if kernel == EXPAND:
        return ExpandingCalls(record, records, tokens)
    if not record.layer.experts:
        return MatrixCalls(record, records, tokens, threads)
    return CompiledCalls(record, records, tokens, threads, int8=kernel == INT8)


def obstacle(case: Case) -> str | None:
    """Why the CPU has no such kernel for `case`, or None."""
    if case.kernel == EXPAND:
        return None
    if case.layer.experts:
        found = supported(make_layout(case.layer, case.codec))
        if found is not None or case.kernel == FP32:
            return found
    elif case.kernel == FP32:
        return "compiled for experts, not for one matrix"
    matrices = (geometry(case.codec, shape) for shape in case.layer.shapes)
    return next(filter(None, map(int8_obstacle, matrices)), None)


class CompiledCalls:
    """Experts by compiled code that unpacks weights in registers; see `HostExperts`.

    Raises:
        ValueError: `engine.kernels.host.supported` says why not.
    """

    def __init__(
        self, record: Record, records: torch.Tensor, tokens: int, threads: int, *, int8: bool
    ) -> None:
        self.routed = Routed(record, records, tokens)
        self._compute = HostExperts(record.layout, threads, int8=int8)
        self._tokens = np.repeat(np.arange(tokens, dtype=np.int64), record.layer.top_k)
        self._which, self._x = self.routed.which.numpy(), self.routed.x.numpy()
        self._records = list(records)
        self.output = torch.empty(self.routed.output_shape)
        self._out = self.output.numpy()

    def __call__(self, number: int) -> None:
        """See `Calls`."""
        some = [self._records[place] for place in self.routed.places(number)]
        self._compute.compute(some, self._x, self._tokens, self._which, self._out)


class MatrixCalls:
    """One packed matrix with int8 activations, as packed linear modules are computed."""

    def __init__(self, record: Record, records: torch.Tensor, tokens: int, threads: int) -> None:
        self.routed = Routed(record, records, tokens)
        self._linear = Int8Linear(threads)
        self._weights = [matrix_view(one, record.matrices[0]) for one in records]
        self.output = torch.empty(self.routed.output_shape)

    def __call__(self, number: int) -> None:
        """See `Calls`."""
        (place,) = self.routed.places(number)
        weight = self._weights[place]
        assert isinstance(weight, Packed), "nobody asked for an obstacle"
        self.output = self._linear(self.routed.x, weight)


class ExpandingCalls:
    """Experts, or one matrix, expanded to fp32 tile by tile, which torch multiplies.

    By as many threads as torch has.
    """

    def __init__(self, record: Record, records: torch.Tensor, tokens: int) -> None:
        self.routed = Routed(record, records, tokens)
        self._record, self._records = record, records
        self._kernels = CpuKernels()
        self._views = dict[int, list[Weight]]()
        self._mine = [
            (self.routed.which == expert).nonzero().flatten()
            for expert in range(len(self.routed.experts))
        ]
        self.output = torch.empty(self.routed.output_shape)

    def __call__(self, number: int) -> None:
        """See `Calls`."""
        for mine, place in zip(self._mine, self.routed.places(number), strict=True):
            self.output[mine] = self._expert(self._inputs(mine), self._matrices(place))

    def _inputs(self, mine: torch.Tensor) -> torch.Tensor:
        x = self.routed.x
        return x[mine // self.routed.top_k.shape[1]] if self._record.layer.experts else x

    def _expert(self, x: torch.Tensor, matrices: list[Weight]) -> torch.Tensor:
        first = self._kernels.linear(x, matrices[0])
        if not self._record.layer.experts:
            return first
        gate, up = first.chunk(2, dim=1)
        return self._kernels.linear(torch.nn.functional.silu(gate).mul_(up), matrices[1])

    def _matrices(self, place: int) -> list[Weight]:
        if place not in self._views:
            record = self._records[place]
            self._views[place] = [matrix_view(record, m) for m in self._record.matrices]
        return self._views[place]


def cpu_work(calls: Calls) -> Work:
    """One call after another, by the clock on the wall."""
    numbers = itertools.count()
    return repeated(lambda: calls(next(numbers)))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """So many for torch, within it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
