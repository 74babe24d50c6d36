"""What a source says about a tensor that it holds in few bits, beside what `recipes.Source` asks.

A quantised tensor has the shape and the values that transformers would see; `read` gives those
in fp32. How it is stored is asked with `packing`, and its parts are read with `fields`.
"""

from typing import NamedTuple, Protocol

from tierrun.engine.codecs.codec import Codec
from tierrun.engine.codecs.planes import Fields


class Packing(NamedTuple):
    """The tensor is in `codec`, whose groups run along dimension `axis` of its shape."""

    codec: Codec
    axis: int


class PackedSource(Protocol):
    """Quantised tensors, kept as they are."""

    def packing(self, name: str) -> Packing | None:
        """How tensor `name` is stored; None where it holds plain numbers."""
        ...

    def fields(self, name: str, start: int, stop: int) -> Fields:
        """Rows `start` to `stop` of tensor `name`, with the packed dimension taken as columns.

        Rows count over all other dimensions in their order: of a tensor [E, out, in] packed along
        the last, row `e * out + r` is row r of expert e; of one [E, in, out] packed along
        dimension 1, row `e * out + r` is column r.

        Raises:
            CheckpointError: the file ends early, or a scale is NaN or infinite (named).
        """
        ...
