# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Sums of products of 16 tokens and 16 rows by Intel's AMX: a matrix of codes times one of
activations is one instruction, for each group of inputs.

What `int8_panel` unpacks has the layout that it wants already: lines of four codes of each row.
"""

import ctypes
import logging
import platform
from functools import lru_cache

from llvmlite import ir
from numba.core import cgutils

from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels.int8_rows import CHUNK_BYTES
from tierrun.engine.kernels.lanes import BYTE, I16, I64, offset_by
from tierrun.engine.kernels.native import stacked

log = logging.getLogger(__name__)

TOKENS, ROWS = 16, 16
"""That are multiplied at once."""

_LINE = 4 * TILE_ROWS
_GROUP_BYTES = 4 * ROWS * TOKENS
_ACTIVATIONS, _CODES, _SUMS = BYTE(0), BYTE(1), BYTE(2)
"""Tile registers; the processor renames them, so that one set will do."""
_CONFIGURATION_BYTES, _WIDTHS, _HEIGHTS = 64, 16, 48
_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@lru_cache
def granted() -> bool:
    """Whether Linux lets this process use tile registers, which it has to ask for."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    refused = libc.syscall(_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    if refused:
        log.warning("the CPU's AMX is not used: the system refuses it (%d)", ctypes.get_errno())
    return not refused


class Sums:
    """Of every group of a chunk, int32 [group, token, row], in memory that stays in cache."""

    def __init__(self, builder, inputs: int, groups: int) -> None:
        """There are at most so many `groups`, of so many `inputs` each."""
        self.builder, self.inputs = builder, inputs
        self.place = builder.bitcast(stacked(builder, groups * _GROUP_BYTES), BYTE.as_pointer())

    def begin(self) -> None:
        """Set the registers up; until `end` this thread's switches cost what they hold."""
        builder = self.builder
        configuration = stacked(builder, _CONFIGURATION_BYTES)
        widths = [self.inputs, 4 * ROWS, 4 * ROWS] + [0] * 5
        heights = [TOKENS, self.inputs // 4, TOKENS] + [0] * 5
        palette = [1] + [0] * (_CONFIGURATION_BYTES - 1)
        parts = [(0, BYTE, palette), (_WIDTHS, I16, widths), (_HEIGHTS, BYTE, heights)]
        for offset, kind, values in parts:
            place = offset_by(builder, configuration, I64(offset))
            value = ir.Constant(ir.ArrayType(kind, len(values)), values)
            builder.store(value, builder.bitcast(place, value.type.as_pointer()))
        self._call("ldtilecfg", builder.bitcast(configuration, BYTE.as_pointer()))

    def end(self) -> None:
        """Let go of the registers."""
        self._call("tilerelease")

    def multiply(self, number, words, activations) -> None:
        """Fill in group `number` (int64): its codes are the lines at `words`, the activations of
        the first token are at `activations`, those of each further one CHUNK_BYTES on."""
        builder = self.builder
        sums = offset_by(builder, self.place, builder.mul(number, I64(_GROUP_BYTES)))
        self._call("tilezero", _SUMS)
        self._call("tileloadd64", _ACTIVATIONS, activations, I64(CHUNK_BYTES))
        self._call("tileloadd64", _CODES, words, I64(_LINE))
        self._call("tdpbssd", _SUMS, _ACTIVATIONS, _CODES)
        self._call("tilestored64", _SUMS, sums, I64(4 * ROWS))

    def of(self, number, token, kind):
        """Those of group `number` and a token (int64), a vector of `kind`."""
        builder = self.builder
        place = builder.mul(number, I64(_GROUP_BYTES))
        place = builder.add(place, builder.mul(token, I64(4 * ROWS)))
        place = offset_by(builder, self.place, place)
        return builder.load(builder.bitcast(place, kind.as_pointer()), align=4)

    def _call(self, name: str, *given) -> None:
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in given])
        call = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.x86.{name}")
        self.builder.call(call, given)
