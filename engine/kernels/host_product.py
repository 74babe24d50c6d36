# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""What emitters of one tile's product share: where its operands are and where its sums go."""

from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels.geometry import Geometry
from tierrun.engine.kernels.lanes import BYTE, I64, offset_by
from tierrun.engine.kernels.native import at


class Product:
    """Tile number `tile` of the matrix `M` at `base` (pointer to bytes) times a few tokens.

    `inputs` and `out` are the addresses that `host_sums.tile_sums` explains; `features` LLVM's
    names of what the machine has.
    """

    def __init__(self, builder, features, M: Geometry, base, tile, inputs, out) -> None:
        self.builder, self.features, self.M = builder, features, M
        self.base, self.tile, self.inputs, self.out = base, tile, inputs, out

    def activations(self, tokens: int):
        """Pointers to the tokens' rows of inputs, as bytes."""
        places = at(self.builder, self.inputs, I64)
        found = []
        for token in range(tokens):
            address = self.builder.load(self.builder.gep(places, [I64(token)], source_etype=I64))
            found.append(self.builder.inttoptr(address, BYTE.as_pointer()))
        return found

    def result(self, token: int, row):
        """Where the sum of `row` (int64) of the tile goes, as bytes."""
        offset = self.builder.add(I64(4 * TILE_ROWS * token), self.builder.mul(row, I64(4)))
        return offset_by(self.builder, at(self.builder, self.out, BYTE), offset)
