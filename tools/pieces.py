"""The bytes of a packed matrix in the order of its planes, without holding all of it."""

from collections.abc import Callable, Iterator, Sequence

import torch

from tierrun.engine.codecs.codec import Codec
from tierrun.engine.codecs.planes import TILE_ROWS, Fields, Plane, pack_planes, planes

PIECE_BYTES = 64 << 20
"""Resident weights pass through memory in pieces of at most this size."""

_ELEMENTS = 4 << 20
_HELD_BYTES = 192 << 20


def packed_pieces(
    codec: Codec, shape: tuple[int, ...], fields: Callable[[int, int], Fields]
) -> Iterator[torch.Tensor]:
    """The bytes of a matrix `shape` [out, in] whose rows `fields` gives in multiples of a tile.

    The first plane is given as it is made; the others meanwhile collect. Where they are too many
    to hold, the rows are asked for again.
    """
    rows, columns = shape
    described = planes(codec, rows, columns)
    step = max(1, _ELEMENTS // (columns * TILE_ROWS)) * TILE_ROWS
    end = 0
    for first, others in _passes(described):
        held: dict[int, list[torch.Tensor]] = {index: [] for index in others}
        yield from padding(described[first].offset - end)
        for start in range(0, rows, step):
            parts = pack_planes(codec, fields(start, min(start + step, rows)))
            yield parts[first]
            for index in others:
                held[index].append(parts[index])
        end = described[first].offset + described[first].nbytes
        for index in others:
            yield from padding(described[index].offset - end)
            yield from held.pop(index)
            end = described[index].offset + described[index].nbytes


def padding(nbytes: int) -> Iterator[torch.Tensor]:
    """`nbytes` zeros, if any."""
    if nbytes:
        yield torch.zeros(nbytes, dtype=torch.uint8)


def _passes(described: Sequence[Plane]) -> Iterator[tuple[int, list[int]]]:
    """Planes by number: one to be streamed, and those after it that are held meanwhile."""
    first, others, held = 0, list[int](), 0
    for index in range(1, len(described)):
        if held + described[index].nbytes > _HELD_BYTES:
            yield first, others
            first, others, held = index, [], 0
        else:
            others.append(index)
            held += described[index].nbytes
    yield first, others
