"""Recognising quantised weights of published checkpoints by the tensors beside them.

The layouts are those of transformers' `finegrained_fp8` and `mxfp4` integrations, of
compressed-tensors' compressors and of NVIDIA's ModelOpt export. Each weight is recognised by
itself, so that a checkpoint may mix formats and leave weights as they are.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch

from tierrun.engine.codecs.codec import find_codec
from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.packing import Packing
from tierrun.tools.sources.quantised_tensors import (
    Blocks,
    Codes,
    PackedRows,
    QuantisedTensor,
    Stored,
)

_ELEMENTS = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e8m0fnu: "e8m0",
    torch.uint8: "e8m0",
}
"""What scales are stored in; exponents also go as plain bytes."""

_UNUSED = (
    ".input_scale", ".activation_scale", "_activation_scale", ".input_global_scale",
    ".weight_shape", ".weight_g_idx", ".q_scale", ".k_scale", ".v_scale", ".output_scale",
)  # fmt: skip
"""For quantised activations and caches, which tierrun has not, and what shapes say already."""


class Tensors(Stored, Protocol):
    """A checkpoint's tensors by name."""

    def __contains__(self, name: str) -> bool: ...


@dataclass(slots=True)
class Found:
    """Quantised weights by the names that transformers has for them; tensors that are theirs."""

    weights: dict[str, QuantisedTensor] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)


def recognise(tensors: Tensors, names: list[str], config: dict[str, Any]) -> Found:
    """The quantised weights among `names`; `config` is the checkpoint's quantization_config.

    Raises:
        CheckpointError: a part of a weight is missing, or of a shape or kind that is not supported.
    """
    found = Found()
    formats = _Formats(tensors, config)
    for name in names:
        made = formats.weight(name)
        if made is not None:
            logical, weight, parts = made
            found.weights[logical] = weight
            found.parts |= {name, *parts} - {logical}
    found.parts |= {name for name in names if name.endswith(_UNUSED)}
    return found


_Made = tuple[str, QuantisedTensor, list[str]]


@dataclass(frozen=True, slots=True)
class _Formats:
    tensors: Tensors
    config: dict[str, Any]

    def weight(self, name: str) -> _Made | None:
        """The weight whose codes are in tensor `name`: its name, itself, and its other tensors."""
        dtype = self.tensors.dtype(name)
        if name.endswith("_blocks") and dtype == torch.uint8:
            return self._gpt_oss(name)
        if name.endswith(".weight_packed"):
            return self._int_packed(name) if dtype == torch.int32 else self._fp4_packed(name)
        if name.endswith(("_scale", "_scale_inv", ".scale", "_scales")):
            return None
        if dtype == torch.float8_e4m3fn:
            return self._bytes(name, "fp8", 0)
        if dtype == torch.int8 and f"{name}_scale" in self.tensors:
            return self._bytes(name, "int8", 128)
        if name.endswith("weight") and dtype in (torch.int8, torch.uint8):
            return self._fp4(name)
        if dtype == torch.float8_e5m2:
            raise CheckpointError(f"tensor {name} is FP8 of the kind e5m2: not supported")
        return None

    def _gpt_oss(self, name: str) -> _Made:
        """Experts transposed, [experts, in, out], of blocks [experts, out, in / 32, 16]."""
        logical = name.removesuffix("_blocks")
        scales = self._beside(name, f"{logical}_scales")
        shape = self.tensors.shape(name)
        if len(shape) != 4 or shape[3] != 16 or self.tensors.shape(scales) != shape[:3]:
            raise self._mismatch(name, scales)
        experts, out, groups, _ = shape
        weight = QuantisedTensor(
            (experts, groups * 32, out),
            Packing(find_codec("mxfp4"), 1),
            Codes(name, groups * 16, groups * 32, 4),
            (Blocks(scales, out, 1, groups),),
        )
        return logical, weight, [scales]

    def _bytes(self, name: str, family: str, flip: int) -> _Made:
        """FP8 or int8 weights with scales by block, channel or tensor."""
        stem = name.removesuffix(".weight")
        near = [f"{name}_scale_inv", f"{stem}.scale", f"{stem}.qscale_weight", f"{name}_scale"]
        scales = self._beside(name, *near)
        shape = self.tensors.shape(name)
        blocks, per = self._grid(name, scales, shape)
        group = "row" if per is None else f"g{per}"
        zeros = f"{name}_zero_point"
        asymmetric = family == "int8" and zeros in self.tensors
        codec = f"{family}{'z' if asymmetric else ''}_{group}_{self._element(scales)}"
        weight = QuantisedTensor(
            shape,
            Packing(find_codec(codec), len(shape) - 1),
            Codes(name, shape[-1], shape[-1], 8, flip),
            (blocks,),
            self._grid(name, zeros, shape, flip)[0] if asymmetric else None,
        )
        return name, weight, [scales, zeros] if asymmetric else [scales]

    def _fp4(self, name: str) -> _Made:
        """Two FP4 numbers to a byte: NVFP4 of ModelOpt, or MXFP4 of DeepSeek V4."""
        stem = name.removesuffix(".weight")
        if f"{name}_scale_2" in self.tensors:
            scales = self._beside(name, f"{name}_scale")
            return self._two_to_a_byte(name, name, "nvfp4", [scales, f"{name}_scale_2"])
        if self.tensors.dtype(name) == torch.uint8 and f"{name}_scale" in self.tensors:
            self._beside(name, f"{name}_scale_2")
        scales = self._beside(name, f"{stem}.scale", f"{name}_scale_inv")
        return self._two_to_a_byte(name, name, "mxfp4", [scales])

    def _fp4_packed(self, name: str) -> _Made:
        """The same of compressed-tensors, whose global scale divides."""
        logical = name.removesuffix("_packed")
        scales = self._beside(name, f"{logical}_scale")
        if self._element(scales) == "e8m0":
            return self._two_to_a_byte(name, logical, "mxfp4", [scales])
        divisor = self._beside(name, f"{logical}_global_scale")
        return self._two_to_a_byte(name, logical, "nvfp4_div", [scales, divisor])

    def _two_to_a_byte(self, name: str, logical: str, codec: str, scales: list[str]) -> _Made:
        *rest, stride = self.tensors.shape(name)
        shape, described = (*rest, 2 * stride), find_codec(codec)
        if shape[-1] % (described.scale[0].per or 1):
            raise self._mismatch(name, scales[0])
        grids = []
        for scale, level in zip(scales, described.scale, strict=True):
            blocks, per = self._grid(name, scale, shape)
            if self._element(scale) != level.element or (per or shape[-1]) != (
                level.per or shape[-1]
            ):
                raise CheckpointError(
                    f"tensor {scale} has {self.tensors.dtype(scale)} scales by {per or 'rows'}: "
                    f"not {codec}, not supported"
                )
            grids.append(blocks)
        packing = Packing(described, len(shape) - 1)
        weight = QuantisedTensor(shape, packing, Codes(name, stride, shape[-1], 4), tuple(grids))
        return logical, weight, scales

    def _int_packed(self, name: str) -> _Made:
        """Integers of 4 or 8 bits of compressed-tensors, in 32-bit words from the low bits up."""
        logical = name.removesuffix("_packed")
        scales, zeros = self._beside(name, f"{logical}_scale"), f"{logical}_zero_point"
        if f"{logical}_g_idx" in self.tensors:
            raise CheckpointError(
                f"tensor {name} has its inputs in the order of their activations "
                f"({logical}_g_idx): not supported"
            )
        rows, words = self.tensors.shape(name)
        columns, bits = self._columns(f"{logical}_shape", name, words)
        shape = (rows, columns)
        blocks, per = self._grid(name, scales, shape)
        asymmetric, grid = zeros in self.tensors, None
        if asymmetric:
            grid = PackedRows(zeros, bits, blocks.groups)
            if self.tensors.shape(zeros) != (-(-rows * bits // 32), blocks.groups):
                raise self._mismatch(name, zeros)
        group = "row" if per is None else f"g{per}"
        codec = f"int{bits}{'z' if asymmetric else ''}_{group}_{self._element(scales)}"
        weight = QuantisedTensor(
            shape,
            Packing(find_codec(codec), 1),
            Codes(name, 4 * words, columns, bits),
            (blocks,),
            grid,
        )
        return logical, weight, [scales, zeros] if asymmetric else [scales]

    def _columns(self, shape: str, name: str, words: int) -> tuple[int, int]:
        """Inputs of an integer weight, and bits per code."""
        widths = {group["num_bits"] for group in weight_groups(self.config)} & {4, 8}
        count = None
        if shape in self.tensors and self.tensors.shape(shape) == (2,):
            count = int(self.tensors.elements(shape, 1, 2))
        for bits in sorted(widths):
            if count is None and len(widths) == 1:
                return words * 32 // bits, bits
            if count is not None and -(-count * bits // 32) == words:
                return count, bits
        raise CheckpointError(
            f"tensor {name} has {words} words per row for {count} inputs: not of 4 or 8 bits, "
            "which are the widths supported"
        )

    def _grid(
        self, name: str, scales: str, shape: tuple[int, ...], flip: int = 0
    ) -> tuple[Blocks, int | None]:
        """Where the numbers in `scales` apply to weight `name`; inputs per group (None: all)."""
        *outer, rows, columns = shape
        given = self.tensors.shape(scales)
        if prod(given) == 1:
            return Blocks(scales, prod(shape[:-1]), prod(shape[:-1]), 1, flip), None
        if len(given) == 1 and given[0] == rows and not outer:
            return Blocks(scales, rows, 1, 1, flip), None
        if len(given) == 1 and outer == [given[0]]:
            return Blocks(scales, rows, rows, 1, flip), None
        if len(given) != len(shape) or list(given[:-2]) != outer or 0 in given:
            raise self._mismatch(name, scales)
        down, across = given[-2:]
        for height, width in self._block_sizes(rows, columns, down, across):
            if -(-rows // height) == down and -(-columns // width) == across:
                return Blocks(scales, rows, height, across, flip), None if across == 1 else width
        raise self._mismatch(name, scales)

    def _block_sizes(
        self, rows: int, columns: int, down: int, across: int
    ) -> list[tuple[int, int]]:
        """The block that the configuration names, groups that it names, or equal parts."""
        named = self.config.get("weight_block_size")
        blocks = [(int(named[0]), int(named[1]))] if named else []
        for group in weight_groups(self.config):
            if group.get("block_structure"):
                height, width = group["block_structure"]
                blocks.append((int(height), int(width)))
            if int(group.get("group_size") or -1) != -1:  # -1: by channel
                blocks.append((1, int(group["group_size"])))
        if rows % down == 0 and columns % across == 0:
            blocks.append((rows // down, columns // across))
        if any(height <= 0 or width <= 0 for height, width in blocks):
            raise CheckpointError(f"quantization_config has blocks of {blocks}")
        return blocks

    def _element(self, scales: str) -> str:
        dtype = self.tensors.dtype(scales)
        if dtype not in _ELEMENTS:
            raise CheckpointError(f"tensor {scales} has {dtype} scales: not supported")
        return _ELEMENTS[dtype]

    def _beside(self, name: str, *companions: str) -> str:
        for companion in companions:
            if companion in self.tensors:
                return companion
        raise CheckpointError(
            f"tensor {companions[0]} is missing, without which {name} means nothing; "
            "download the checkpoint again"
        )

    def _mismatch(self, name: str, scales: str) -> CheckpointError:
        return CheckpointError(
            f"tensor {scales} of shape {list(self.tensors.shape(scales))} does not fit {name} of "
            f"shape {list(self.tensors.shape(name))}"
        )


def weight_groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    """How compressed-tensors says that weights are quantised, by group of modules."""
    groups = config.get("config_groups")
    entries = groups.values() if isinstance(groups, dict) else []
    weights = (entry.get("weights") for entry in entries if isinstance(entry, dict))
    return [entry for entry in weights if isinstance(entry, dict)]
