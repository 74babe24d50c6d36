"""A weight as it is stored: a tensor of plain numbers, or a matrix in a codec's planes."""

import torch

from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.codecs.packed import Packed
from tierrun.io.store import Matrix

Weight = torch.Tensor | Packed


def matrix_view(record: torch.Tensor, matrix: Matrix) -> Weight:
    """The matrix inside a record's bytes (uint8 [record bytes]), nothing copied.

    Raises:
        StoreError: a codec that this tierrun does not compute with.
        CorruptError: an extent that is not that of a matrix of its shape.
    """
    data = record[matrix.extent.offset : matrix.extent.end]
    if matrix.codec in DTYPES:
        return data.view(DTYPES[matrix.codec]).view(matrix.shape)
    return Packed.over(data, find_codec(matrix.codec), matrix.shape)


def widened(weight: Weight) -> torch.Tensor:
    """All of `weight` in fp32."""
    return weight.dense() if isinstance(weight, Packed) else weight.to(torch.float32)
