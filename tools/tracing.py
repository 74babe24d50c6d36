"""Which rows of which stored tensors a matrix is made of, found by converting labels.

A conversion that only moves values about does not care what they are. So it runs on labels, a byte
per element: each byte of the element's row number, then of its column number, and what comes out
says where each row and column came from. That is then proved: random bytes, the exclusive or of one
per row and one per column, must come out as found. Arithmetic, rows mixed from several, or columns
in more than one order cannot pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch

from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.source import Reads

_CHECKED_ELEMENTS = 4 << 20


class Grid(NamedTuple):
    """A tensor of `shape` with dimension `axis` taken as columns, all others in turn as rows."""

    shape: tuple[int, ...]
    axis: int

    @property
    def columns(self) -> int:
        return self.shape[self.axis]

    @property
    def rows(self) -> int:
        return prod(self.shape) // max(self.columns, 1)

    def fill(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """A tensor of this shape: `rows` [rows] exclusive-or `columns` [columns]."""
        dims = range(len(self.shape))
        by_row = rows.view([1 if dim == self.axis else self.shape[dim] for dim in dims])
        return by_row ^ columns.view([-1 if dim == self.axis else 1 for dim in dims])


@dataclass(frozen=True, slots=True)
class Selection:
    """Row i of a matrix is row `rows[i]` of tensor number `tensors[i]`; both int64 [out].

    With `columns` [in], column k of the matrix is column `columns[k]` there.
    """

    tensors: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor | None

    def part(self, which: slice) -> "Selection":
        """The rows `which` alone."""
        return Selection(self.tensors[which], self.rows[which], self.columns)


_Make = Callable[[Reads], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Tracer:
    """Traces conversions; what was found is tried first on tensors of the same shapes.

    Layers are alike, and proving a guess takes one run of the conversion instead of five.
    """

    _known: dict[tuple[Grid, ...], list[Selection]] = field(default_factory=dict)

    def trace(self, grids: Mapping[str, Grid], make: _Make) -> Selection | None:
        """How `make` selects rows of the tensors `grids`; None where it does anything else.

        `make` gives a matrix [out, in] of what it reads; tensors are numbered as `grids` has them.
        """
        if len({grid.columns for grid in grids.values()}) != 1:
            return None
        conversion = _Conversion(grids, make)
        known = self._known.setdefault(tuple(grids.values()), [])
        for selection in known:
            if conversion.is_proved(selection):
                return selection
        found = conversion.find()
        if found is None or not conversion.is_proved(found):
            return None
        known.append(found)
        return found


@dataclass(frozen=True, slots=True)
class _Conversion:
    """One conversion `make` of the tensors `grids`, to be run on labels."""

    grids: Mapping[str, Grid]
    make: _Make

    @property
    def starts(self) -> torch.Tensor:
        """The number of each tensor's first row, counting through all, and of all rows."""
        return torch.tensor([0, *(grid.rows for grid in self.grids.values())]).cumsum(0)

    @property
    def columns(self) -> int:
        return next(iter(self.grids.values())).columns

    def run(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor | None:
        """What becomes of the labels `rows` ^ `columns`; None if not a matrix of labels."""
        starts = self.starts.tolist()
        filled = {
            name: grid.fill(rows[start:stop], columns)
            for (name, grid), start, stop in zip(
                self.grids.items(), starts[:-1], starts[1:], strict=True
            )
        }
        try:
            made = self.make(_Labels(filled))
        except CheckpointError:  # an operation that labels cannot go through
            return None
        return made if made.dtype == torch.uint8 and made.ndim == 2 else None

    def find(self) -> Selection | None:
        """What the first row and the first column of the outcome say."""
        count, columns = int(self.starts[-1]), self.columns
        zero = torch.zeros(max(count, columns), dtype=torch.uint8)
        rows = _gather(count, lambda label: _edge(self.run(label, zero[:columns]), 1))
        found = _gather(columns, lambda label: _edge(self.run(zero[:count], label), 0))
        if rows is None or found is None or int(rows.max()) >= count:
            return None
        tensors = torch.searchsorted(self.starts, rows, right=True) - 1
        in_order = torch.equal(found, torch.arange(columns))
        return Selection(tensors, rows - self.starts[tensors], None if in_order else found)

    def is_proved(self, selection: Selection) -> bool:
        """Whether random labels come out as `selection` says."""
        generator = torch.Generator().manual_seed(0)
        count = int(self.starts[-1])
        rows = torch.randint(256, (count,), generator=generator, dtype=torch.uint8)
        columns = torch.randint(256, (self.columns,), generator=generator, dtype=torch.uint8)
        made = self.run(rows, columns)
        by_row = rows[self.starts[selection.tensors] + selection.rows]
        order = torch.arange(self.columns) if selection.columns is None else selection.columns
        if made is None or made.shape != (len(by_row), len(order)) or not self._is_order(order):
            return False
        step = max(1, _CHECKED_ELEMENTS // max(len(order), 1))
        return all(
            torch.equal(got, wanted[:, None] ^ columns[order])
            for got, wanted in zip(torch.split(made, step), torch.split(by_row, step), strict=True)
        )

    def _is_order(self, order: torch.Tensor) -> bool:
        """Whether every column is there once."""
        return torch.equal(order.sort().values, torch.arange(self.columns))


@dataclass(frozen=True, slots=True)
class _Labels:
    """Labels where tensors are read; those of a slice are there already sliced."""

    tensors: dict[str, torch.Tensor]

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        return self.tensors[name]


def _gather(
    count: int, convert: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.Tensor | None:
    """Numbers below `count` after a conversion of their bytes, one byte at a time."""
    numbers, found = torch.arange(count), None
    for shift in range(0, max(1, (count - 1).bit_length()), 8):
        made = convert((numbers >> shift & 255).to(torch.uint8))
        if made is None:
            return None
        part = made.to(torch.int64) << shift
        found = part if found is None else found | part
    return found


def _edge(made: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    return None if made is None or not made.numel() else made.select(dim, 0)
