"""Quantised weights as safetensors checkpoints hold them: codes in one tensor, scales in others."""

from dataclasses import dataclass
from typing import Protocol

import torch

from tierrun.engine.codecs.codec import Level
from tierrun.engine.codecs.expand import first_bad_row
from tierrun.engine.codecs.planes import Fields
from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.packing import Packing


class Stored(Protocol):
    """The tensors of a checkpoint as its files have them."""

    def dtype(self, name: str) -> torch.dtype: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor: ...


class Grid(Protocol):
    """Numbers for groups of rows and columns: scales, or zero points."""

    def rows(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        """Those of the weight's rows `start` to `stop`, [rows, groups]."""
        ...


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes in tensor `name`: `stride` bytes per row, of `bits` each, the low half first.

    `flip` is what makes them unsigned, exclusive-or.
    """

    name: str
    stride: int
    columns: int
    bits: int
    flip: int = 0

    def rows(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`, uint8 [rows, columns]."""
        units = self.stride // stored.dtype(self.name).itemsize
        data = stored.elements(self.name, start * units, stop * units)
        codes = data.view(torch.uint8).view(stop - start, self.stride)
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
        codes = codes[:, : self.columns]
        return codes ^ self.flip if self.flip else codes.contiguous()


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tensor `name`, a row [groups] for each `block` rows of each matrix of `height` rows.

    `flip` as in `Codes`, for integers.
    """

    name: str
    height: int
    block: int
    groups: int
    flip: int = 0

    def rows(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        rows = torch.arange(start, stop)
        per_matrix = -(-self.height // self.block)
        index = rows // self.height * per_matrix + rows % self.height // self.block
        first, last = int(index[0]), int(index[-1]) + 1
        data = stored.elements(self.name, first * self.groups, last * self.groups)
        if data.dtype in (torch.float8_e8m0fnu, torch.int8):
            data = data.view(torch.uint8)
        values = data.view(-1, self.groups)[index - first]
        return values ^ self.flip if self.flip else values


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Unsigned integers in tensor `name`, int32 [rows / (32 / bits), groups], packed by column."""

    name: str
    bits: int
    groups: int

    def rows(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        per_word = 32 // self.bits
        rows = torch.arange(start, stop)
        index = rows // per_word
        first, last = int(index[0]), int(index[-1]) + 1
        data = stored.elements(self.name, first * self.groups, last * self.groups)
        words = data.view(-1, self.groups)[index - first]
        shift = (rows % per_word * self.bits)[:, None].to(torch.int32)
        return (words >> shift & ((1 << self.bits) - 1)).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A weight of `shape` as transformers would see it; the grids are in its codec's order."""

    shape: tuple[int, ...]
    packing: Packing
    codes: Codes
    scales: tuple[Blocks, ...]
    zero_points: Grid | None = None

    @property
    def columns(self) -> int:
        return self.shape[self.packing.axis]

    def fields(self, stored: Stored, start: int, stop: int) -> Fields:
        """Rows `start` to `stop`, counted as in `PackedSource`.

        Raises:
            CheckpointError: a scale that is NaN or infinite.
        """
        scales = tuple(grid.rows(stored, start, stop) for grid in self.scales)
        for grid, level, values in zip(self.scales, self.packing.codec.scale, scales, strict=True):
            _check_finite(grid.name, level, values, start)
        zero = None if self.zero_points is None else self.zero_points.rows(stored, start, stop)
        return Fields(self.codes.rows(stored, start, stop), scales, (), zero)


def _check_finite(name: str, level: Level, scales: torch.Tensor, start: int) -> None:
    bad = first_bad_row(level, scales)
    if bad is not None:
        raise CheckpointError(
            f"tensor {name} has a scale for row {start + bad} that is NaN or infinite; "
            "download it again"
        )
