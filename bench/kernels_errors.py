"""What the CPU's kernels round: outputs beside the exact product of the same packed weights."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import silu

from tierrun.bench.cells import Value
from tierrun.bench.kernels_calls import Routed
from tierrun.bench.kernels_cpu import cpu_calls, torch_threads
from tierrun.bench.kernels_layers import Layer, Record, make_record
from tierrun.bench.kernels_plan import EXPERTS_KERNELS, Case
from tierrun.bench.sheets import Sheet, split_keys
from tierrun.engine.codecs.weight import matrix_view, widened

TOKENS = 8


class Error(NamedTuple):
    """Of a layer in a codec by one kernel: root mean square, relative to the exact output's."""

    layer: str
    codec: str
    kernel: str
    error: float


def errors(cases: Sequence[Case]) -> Iterator[Error]:
    """Of every layer, codec and kernel among `cases`, which the CPU has kernels for."""
    kernels = dict[tuple[Layer, str], dict[str, int]]()
    for case in cases:
        kernels.setdefault((case.layer, case.codec), {})[case.kernel] = case.threads or 1
    for (layer, codec), names in kernels.items():
        record = make_record(layer, codec).alone
        wanted = exact_output(record, Routed(record, record.data[None], TOKENS))
        for kernel, threads in names.items():
            yield Error(layer.name, codec, kernel, _error(record, kernel, threads, wanted))


def exact_output(record: Record, routed: Routed) -> torch.Tensor:
    """What the only expert, or matrix, of `record` makes of the tokens, in fp64."""
    first, *down = (widened(matrix_view(record.data, m)).double() for m in record.matrices)
    product = routed.x.double() @ first.T
    if not down:
        return product
    gate, up = product.chunk(2, dim=1)
    return (silu(gate) * up) @ down[0].T


def _error(record: Record, kernel: str, threads: int, wanted: torch.Tensor) -> float:
    with torch_threads(threads):
        calls = cpu_calls(kernel, record, record.data[None], TOKENS, threads)
        calls(0)
    return float((calls.output.double() - wanted).norm() / wanted.norm())


def sheet_of_errors(found: Sequence[Error]) -> Sheet:
    """A row for each layer and codec, a column for each kernel."""
    kernels = [kernel for kernel in EXPERTS_KERNELS if kernel in {error.kernel for error in found}]
    rows = dict[tuple[str, str], dict[str, float]]()
    for error in found:
        rows.setdefault((error.layer, error.codec), {})[error.kernel] = error.error
    keys: list[dict[str, Value]] = [{"layer": layer, "codec": codec} for layer, codec in rows]
    names = split_keys(keys)[0] or ["codec"]
    return Sheet(
        f"outputs' error by kernel: root mean square, relative to the exact product's, of {TOKENS} "
        "tokens",
        (*names, *kernels),
        tuple(
            (
                *(str(key[name]) for name in names),
                *(f"{row[kernel]:.1e}" if kernel in row else "-" for kernel in kernels),
            )
            for key, row in zip(keys, rows.values(), strict=True)
        ),
    )
