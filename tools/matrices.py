"""How each matrix of a record is made: as numbers, kept packed, or quantised."""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from tierrun.engine.codecs.codec import Codec
from tierrun.engine.codecs.dense import CODECS
from tierrun.engine.codecs.planes import pack, packed_bytes
from tierrun.tools.assembling import ExpertParameter
from tierrun.tools.gathering import gather
from tierrun.tools.quantise import Tally, quantise
from tierrun.tools.sources.source import Reads, Source
from tierrun.tools.tracing import Selection

ALL = slice(None)


class MatrixRecipe(Protocol):
    """One matrix [out, in] of a record (or a bias [out]) called `name`, in `codec`."""

    @property
    def name(self) -> str: ...

    @property
    def codec(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def parameter(self) -> ExpertParameter: ...

    def make(self, source: Source, expert: int) -> torch.Tensor:
        """The matrix of `expert` as it is stored, contiguous.

        Raises:
            CheckpointError: the source's values cannot be read or used.
        """
        ...


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """The rows `rows` of `parameter` as numbers of `dtype`."""

    name: str
    parameter: ExpertParameter
    rows: slice
    dtype: torch.dtype

    @property
    def codec(self) -> str:
        return CODECS[self.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        out, *rest = self.parameter.shape
        return (len(range(out)[self.rows]), *rest)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def make(self, source: Reads, expert: int) -> torch.Tensor:
        return self.parameter.make(source, expert)[self.rows].to(self.dtype).contiguous()


@dataclass(frozen=True, slots=True)
class KeptMatrix:
    """Packed rows of the source, as `selection` says, of the tensors that an expert is made of.

    `rows_per_expert` is how many rows of them each expert has before the next one's begin.
    """

    name: str
    parameter: ExpertParameter
    kind: Codec
    selection: Selection
    columns: int
    rows_per_expert: int

    @property
    def codec(self) -> str:
        return self.kind.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.selection.rows), self.columns)

    @property
    def nbytes(self) -> int:
        return packed_bytes(self.kind, self.shape)

    def make(self, source: Source, expert: int) -> torch.Tensor:
        names = self.parameter.names(expert)
        first = expert * self.rows_per_expert
        return pack(self.kind, gather(source, self.kind, names, self.selection, first))


@dataclass(frozen=True, slots=True)
class QuantisedMatrix:
    """What `dense` makes, quantised; the error goes on `tally`."""

    dense: DenseMatrix
    kind: Codec
    tally: Tally

    @property
    def name(self) -> str:
        return self.dense.name

    @property
    def parameter(self) -> ExpertParameter:
        return self.dense.parameter

    @property
    def codec(self) -> str:
        return self.kind.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dense.shape

    @property
    def nbytes(self) -> int:
        return packed_bytes(self.kind, self.shape)

    def make(self, source: Source, expert: int) -> torch.Tensor:
        values = self.dense.make(source, expert).to(torch.float32)
        what = f"{self.parameter.assembly.target}, expert {expert}"
        return pack(self.kind, quantise(self.kind, values, what, self.tally))
