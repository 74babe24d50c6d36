"""How each resident weight is made, in pieces: as numbers, kept packed, or quantised."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from transformers import PreTrainedModel

from tierrun.engine.codecs.codec import Codec
from tierrun.engine.codecs.dense import DTYPE_NAMES
from tierrun.engine.codecs.planes import PLANE_ALIGNMENT, Fields, packed_bytes
from tierrun.tools.assembling import in_order, whole
from tierrun.tools.gathering import gather
from tierrun.tools.mapping import Assembly
from tierrun.tools.pieces import PIECE_BYTES, packed_pieces
from tierrun.tools.quantise import Tally, quantise
from tierrun.tools.sources.source import Source
from tierrun.tools.tracing import Selection


class ResidentRecipe(Protocol):
    """A weight outside the experts, under its name in the model.

    `dtype` is a safetensors dtype or a codec's name; `inputs` as in `io.store.Resident`.
    """

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def alignment(self) -> int:
        """Of the first byte; and the weight takes room in its multiples."""
        ...

    @property
    def inputs(self) -> str | None: ...

    def pieces(self, source: Source) -> Iterator[torch.Tensor]:
        """The stored bytes in order, as flat tensors.

        Raises:
            CheckpointError: the source's values cannot be read or used.
        """
        ...


@dataclass(frozen=True, slots=True)
class DenseResident:
    """A weight as numbers; in small pieces where it is its sources one after the other."""

    name: str
    assembly: Assembly
    model: PreTrainedModel
    shape: tuple[int, ...]
    kind: torch.dtype
    streamed: bool
    inputs: None = None

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.kind]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.kind.itemsize

    @property
    def alignment(self) -> int:
        return self.kind.itemsize

    def pieces(self, source: Source) -> Iterator[torch.Tensor]:
        elements, count, step = self.elements(source), prod(self.shape), PIECE_BYTES // 8
        for start in range(0, count, step):
            yield elements(start, min(start + step, count)).to(self.kind)

    def elements(self, source: Source) -> Callable[[int, int], torch.Tensor]:
        """What gives elements from one to another, in memory order, as the source has them."""
        if not self.streamed:
            flat = whole(self.assembly, self.model, source)[self.name].flatten()
            return lambda start, stop: flat[start:stop]
        names = in_order(self.assembly)
        return lambda start, stop: _joined(source, names, start, stop)


@dataclass(frozen=True, slots=True)
class KeptResident:
    """Packed rows of the tensors `names` of the source, as `selection` says."""

    name: str
    shape: tuple[int, ...]
    kind: Codec
    names: Sequence[str]
    selection: Selection
    inputs: str | None

    @property
    def dtype(self) -> str:
        return self.kind.name

    @property
    def nbytes(self) -> int:
        return packed_bytes(self.kind, self.shape)

    @property
    def alignment(self) -> int:
        return PLANE_ALIGNMENT

    def pieces(self, source: Source) -> Iterator[torch.Tensor]:
        def fields(start: int, stop: int) -> Fields:
            rows = self.selection.part(slice(start, stop))
            return gather(source, self.kind, self.names, rows, 0)

        return packed_pieces(self.kind, self.shape, fields)


@dataclass(frozen=True, slots=True)
class QuantisedResident:
    """The weight `dense`, quantised; the error goes on `tally`."""

    dense: DenseResident
    kind: Codec
    tally: Tally
    inputs: None = None

    @property
    def name(self) -> str:
        return self.dense.name

    @property
    def dtype(self) -> str:
        return self.kind.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dense.shape

    @property
    def nbytes(self) -> int:
        return packed_bytes(self.kind, self.shape)

    @property
    def alignment(self) -> int:
        return PLANE_ALIGNMENT

    def pieces(self, source: Source) -> Iterator[torch.Tensor]:
        elements, columns = self.dense.elements(source), self.shape[1]

        def fields(start: int, stop: int) -> Fields:
            values = elements(start * columns, stop * columns)
            values = values.to(self.dense.kind).to(torch.float32).view(-1, columns)
            return quantise(self.kind, values, self.name, self.tally)

        return packed_pieces(self.kind, self.shape, fields)


@dataclass(frozen=True, slots=True)
class InputOrder:
    """Which input each stored column of a weight multiplies."""

    name: str
    order: torch.Tensor
    inputs: None = None
    dtype: str = "I32"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.order.shape)

    @property
    def nbytes(self) -> int:
        return len(self.order) * self.alignment

    @property
    def alignment(self) -> int:
        return torch.int32.itemsize

    def pieces(self, source: Source) -> Iterator[torch.Tensor]:
        yield self.order.to(torch.int32)


def _joined(source: Source, names: Sequence[str], start: int, stop: int) -> torch.Tensor:
    """Elements `start` to `stop` of the tensors `names` one after the other."""
    parts, begin = [], 0
    for name in names:
        count = prod(source.shape(name))
        first, last = max(start - begin, 0), min(stop - begin, count)
        if first < last:
            parts.append(source.elements(name, first, last))
        begin += count
    return parts[0] if len(parts) == 1 else torch.cat(parts)
