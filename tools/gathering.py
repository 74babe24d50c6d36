"""Reading chosen rows of packed tensors, in the order in which a matrix has them."""

from collections.abc import Callable, Sequence

import torch

from tierrun.engine.codecs.codec import Codec
from tierrun.engine.codecs.planes import Fields
from tierrun.tools.sources.packing import PackedSource
from tierrun.tools.tracing import Selection
from tierrun.tools.widening import widen

_GAP = 64
"""Rows that are read and thrown away rather than beginning another read."""


def gather(
    source: PackedSource, codec: Codec, names: Sequence[str], selection: Selection, first_row: int
) -> Fields:
    """The rows of `selection` from the tensors `names`, whose row 0 is their row `first_row`.

    They come in `codec`, which holds those of the tensors.
    """
    order, parts = [], []
    for number in torch.unique(selection.tensors).tolist():
        places = (selection.tensors == number).nonzero().flatten()
        order.append(places)
        packing = source.packing(names[number])
        assert packing is not None
        found = _rows(source, names[number], selection.rows[places] + first_row)
        parts.append(widen(found, packing.codec, codec))
    if len(parts) == 1:
        return parts[0]
    back = torch.cat(order).argsort()
    return map_fields(lambda *tensors: torch.cat(tensors)[back], *parts)


def _rows(source: PackedSource, name: str, rows: torch.Tensor) -> Fields:
    """Rows of one tensor, read in as few pieces as are worth it."""
    wanted = torch.unique(rows)
    ends = (wanted.diff() > _GAP).nonzero().flatten() + 1
    runs = [run for run in wanted.tensor_split(ends) if len(run)]
    ranges = [(int(run[0]), int(run[-1]) + 1) for run in runs]
    parts = [source.fields(name, start, stop) for start, stop in ranges]
    have = torch.cat([torch.arange(start, stop) for start, stop in ranges])
    if torch.equal(have, rows):
        return parts[0] if len(parts) == 1 else map_fields(lambda *t: torch.cat(t), *parts)
    index = torch.searchsorted(have, rows)
    return map_fields(lambda *tensors: torch.cat(tensors)[index], *parts)


def map_fields(function: Callable[..., torch.Tensor], *fields: Fields) -> Fields:
    """`function` of the same part of each of `fields`, part by part."""

    def each(parts: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        return tuple(function(*same) for same in zip(*parts, strict=True))

    zeros = [f.zero_point for f in fields]
    return Fields(
        function(*(f.codes for f in fields)),
        each([f.scale for f in fields]),
        each([f.minimum for f in fields]),
        None if zeros[0] is None else function(*zeros),
    )
