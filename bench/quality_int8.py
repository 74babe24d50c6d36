"""What int8 activations cost in quality: the demo model's perplexity in every codec, by both paths.

    python -m tierrun.bench.quality_int8 [--out quality.json]

Experts and linear modules (all but the routers) are rounded to a codec, plainly: this is no measure
of codecs, but both paths compute with the same packed weights. Perplexity is that of held-out code
(bench.held_out), in windows of 1024 tokens; every product of a window is by the kernels of prompts.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tierrun.bench.quantisation import WINDOW, held_out_windows
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.engine.codecs.codec import ELEMENTS, Codec, Level, find_codec
from tierrun.engine.codecs.expand import power_of_two
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import Fields, pack
from tierrun.engine.gpu.layout import ExpertLayout
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.kernels.geometry import packed_geometry
from tierrun.engine.kernels.host import HostExperts
from tierrun.engine.kernels.int8 import obstacle
from tierrun.engine.kernels.int8_linear import Int8Linear
from tierrun.engine.kernels.matmul import Operand
from tierrun.engine.kernels.matvec import Gate
from tierrun.engine.stored import store_back
from tierrun.io.extent import align_up
from tierrun.tools.demo.run import CHECKPOINT

CODECS = (
    *("q4_k", "q4_0", "mxfp4", "q8_0", "q6_k", "q5_k", "q3_k", "q2_k", "q4_1", "q5_0", "q5_1"),
    *("iq4_nl", "iq4_xs", "nvfp4", "int4_g128_bf16", "int4z_g128_f16", "int8_row_f32"),
)
ALLOWED = 0.005
"""Of the perplexity in fp32: what int8 activations may add."""

_EXPERTS = "tierrun-quality"
_LARGEST = {"u4": 15, "u8": 63, "i8": 31, "e4m3": 448}
"""Of the first of two levels: what the largest of a group of the second is rounded to."""


def rounded(codec: Codec, values: torch.Tensor) -> Packed:
    """`values` fp32 [rows, in] in `codec`, by plain rounding."""
    finest = min(level.per or values.shape[1] for level in codec.scale)
    padded = F.pad(values, (0, -values.shape[1] % finest))
    groups = padded.view(len(padded), -1, finest)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    numbers = codec.numbers()
    if codec.minimum or codec.zero_point:
        scale = (high - low) / (len(numbers) - 1)
    else:
        most = numbers.max() if codec.book is None else numbers.abs().max()
        scale = torch.maximum(high, -low) / most
    scales, scale = _levels(codec.scale, scale, finest)
    below = torch.zeros_like(scale)
    minima: tuple[torch.Tensor, ...] = ()
    zero_point = None
    if codec.minimum:
        minima, below = _levels(codec.minimum, -low, finest)
    elif codec.zero_point is not None:
        zero_point = (-low / scale).round().clamp(0, len(numbers) - 1).to(torch.uint8)
        below = zero_point * scale
    wanted = (groups + below[..., None]) / scale[..., None].clamp_min(1e-30)
    codes = _nearest(numbers, wanted).flatten(1)[:, : values.shape[1]].contiguous()
    fields = Fields(codes, scales, minima, zero_point)
    return Packed.over(pack(codec, fields), codec, tuple(values.shape))


def _levels(
    levels: Sequence[Level], product: torch.Tensor, finest: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The stored factors of `product` [rows, groups ≥ 0], and what they make."""
    if len(levels) == 1:
        if levels[0].per is None:
            product = product[:, :1]
        stored = _stored(levels[0], product)
        return (stored,), _value(levels[0], stored)
    first, second = levels
    per = product.shape[1] if second.per is None else second.per // finest
    whole = F.pad(product, (0, -product.shape[1] % per)).view(len(product), -1, per)
    outer = whole.amax(-1) / _LARGEST[first.element]
    outer_stored = _stored(second, 1 / outer if second.divides else outer)
    outer = _value(second, outer_stored)
    outer = 1 / outer if second.divides else outer
    outer = outer.repeat_interleave(per, 1)[:, : product.shape[1]]
    inner = _stored(first, product / outer.clamp_min(1e-30))
    return (inner, outer_stored), _value(first, inner) * outer


def _stored(level: Level, values: torch.Tensor) -> torch.Tensor:
    if level.element == "e8m0":
        return (values.clamp_min(2.0**-120).log2().ceil() + 127).to(torch.uint8)
    dtype = ELEMENTS[level.element]
    return values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)


def _value(level: Level, stored: torch.Tensor) -> torch.Tensor:
    return power_of_two(stored.int()) if level.element == "e8m0" else stored.float()


def _nearest(numbers: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The codes of the nearest of `numbers`, uint8."""
    ordered, order = numbers.sort()
    place = torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)
    return order[place].to(torch.uint8)


class PackedExperts:
    """One layer's experts in a codec, by one of the two paths."""

    def __init__(self, module: Any, codec: Codec) -> None:
        gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
        self.records, operands = [], []
        for pair in zip(gate_up, down, strict=True):
            parts = [rounded(codec, matrix).data for matrix in pair]
            offset = align_up(len(parts[0]), 64)
            record = torch.zeros(align_up(offset + len(parts[1])) + 64, dtype=torch.uint8)
            record = record[-record.data_ptr() % 64 :]
            record[: len(parts[0])], record[offset : offset + len(parts[1])] = parts
            self.records.append(record)
        operands = [Operand(packed_geometry(codec, tuple(w.shape[1:]))) for w in (gate_up, down)]
        layout = ExpertLayout((operands[0],), operands[1]._replace(offset=offset), Gate("silu"))
        self.paths = {int8: HostExperts(layout, 2, int8=int8) for int8 in (False, True)}

    def __call__(
        self, hidden: torch.Tensor, top_k: torch.Tensor, weights: torch.Tensor, int8: bool
    ) -> torch.Tensor:
        """As the experts module."""
        which = top_k.flatten().numpy()
        tokens = np.arange(len(which)) // top_k.shape[1]
        out = torch.empty(*top_k.shape, hidden.shape[1])
        x = np.ascontiguousarray(hidden.numpy())
        self.paths[int8].compute(self.records, x, tokens, which, out.flatten(0, 1).numpy())
        return (out * weights[..., None]).sum(1)


class Model:
    """The demo model with packed weights; `int8` says by which path it computes."""

    def __init__(self, codec: Codec) -> None:
        self.int8 = False
        self._linear = Int8Linear(2)
        self._experts: dict[nn.Module, PackedExperts] = {}
        ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, self._compute)
        self._model = AutoModelForCausalLM.from_pretrained(
            CHECKPOINT, dtype=torch.float32, experts_implementation=_EXPERTS
        )
        for module in list(self._model.modules()):
            if hasattr(module, "gate_up_proj"):
                self._experts[module] = PackedExperts(module, codec)
            elif type(module) is nn.Linear:
                store_back(module, rounded(codec, module.weight.detach()), self)

    def _compute(
        self, module: nn.Module, hidden: torch.Tensor, top_k: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self._experts[module](hidden, top_k, weights, self.int8)

    def linear(
        self, x: torch.Tensor, weight: Packed, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `CpuKernels`."""
        return CpuKernels(self._linear if self.int8 else None).linear(x, weight, bias)

    def embedding(self, ids: torch.Tensor, weight: Packed) -> torch.Tensor:
        """As `CpuKernels`."""
        return weight.rows(ids)

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        """exp of the mean negative log-likelihood of every window's tokens but its first."""
        total = 0.0
        with torch.inference_mode():
            for window in windows:
                logits = self._model(input_ids=torch.tensor([window[:-1]])).logits[0]
                targets = torch.tensor(window[1:])
                total += F.cross_entropy(logits.double(), targets, reduction="sum").item()
        return math.exp(total / (WINDOW * len(windows)))


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
    codecs: Annotated[str, typer.Option(help="Which codecs, by commas.")] = ",".join(CODECS),
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens.")] = 12,
) -> None:
    """Compare the two paths' perplexities."""
    texts = held_out_windows(windows)
    table = Table(title="the demo model's perplexity, by activations")
    for name in ("codec", "fp32", "int8", "int8 adds"):
        table.add_column(name, justify="left" if name == "codec" else "right")
    found: dict[str, Any] = {}
    for name in codecs.split(","):
        codec = find_codec(name)
        if obstacle(packed_geometry(codec, (32, 256))):
            continue
        model = Model(codec)
        values = []
        for model.int8 in (False, True):
            values.append(model.perplexity(texts))
        added = values[1] / values[0] - 1
        found[name] = {"fp32": values[0], "int8": values[1], "added": added}
        table.add_row(name, *(f"{value:.4f}" for value in values), f"{added:+.3%}")
    open_console().print(table)
    largest = max(abs(values["added"]) for values in found.values())
    verdict = "reached" if largest <= ALLOWED else "missed"
    open_console().print(f"{verdict}: at most {ALLOWED:.1%} apart (largest {largest:.3%})")
    emit(document("quality_int8", {"held_out_tokens": WINDOW * len(texts), "codecs": found}), out)


if __name__ == "__main__":
    run_script(main)
