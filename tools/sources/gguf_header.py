"""The header of a GGUF file, read with every count and length bounded before it is believed.

The gguf package maps the file and trusts it: a length that lies loops for hours or takes all
memory, and a file cut off under it ends the process. Its constants are used, its reader is not.

Format (llama.cpp, ggml/src/gguf.cpp): magic, version, number of tensors, number of keys; keys with
typed values; tensors with name, dimensions (the innermost first), type and offset; the data.
"""

import os
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tierrun.io.errors import CheckpointError
from tierrun.io.extent import Extent, align_up
from tierrun.tools.sources.gguf_cursor import Cursor

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32
_LEAST_KEY_BYTES = 8 + 1 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


class GgmlType(NamedTuple):
    """A way of storing numbers: `nbytes` for every `block` of them."""

    number: int
    name: str
    block: int
    nbytes: int


class GgufTensor(NamedTuple):
    """One tensor, its shape as torch says it; `extent` is absolute in the file."""

    shape: tuple[int, ...]
    type: GgmlType
    extent: Extent

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the last dimension."""
        return self.shape[-1] // self.type.block * self.type.nbytes


class GgufHeader(NamedTuple):
    """What a file says: typed values by key (arrays are lists), and tensors in file order."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


@cache
def _types() -> dict[int, GgmlType]:
    from gguf import GGML_QUANT_SIZES

    return {
        int(kind): GgmlType(int(kind), kind.name, *sizes)
        for kind, sizes in GGML_QUANT_SIZES.items()
    }


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at `path`.

    Raises:
        CheckpointError: not a GGUF that can be read, or a header that contradicts its file.
        OSError: the file cannot be opened or read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        cursor = Cursor(path, descriptor)
        return _read(cursor)
    finally:
        os.close(descriptor)


def _read(cursor: Cursor) -> GgufHeader:
    _check_magic(cursor)
    num_tensors = cursor.count("tensors", _LEAST_TENSOR_BYTES, MAX_TENSORS)
    num_keys = cursor.count("keys", _LEAST_KEY_BYTES, MAX_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.name("a key")
        if key in metadata:
            raise CheckpointError(f"{cursor.path}: key {key} appears twice; {_AGAIN}")
        metadata[key] = cursor.value(key)
    found = [_tensor(cursor) for _ in range(num_tensors)]
    start = align_up(cursor.position, _alignment(cursor, metadata))
    return GgufHeader(metadata, _placed(cursor, found, start))


_AGAIN = "download it again"


def _check_magic(cursor: Cursor) -> None:
    magic = cursor.take(4, "the magic number")
    if magic != b"GGUF":
        raise CheckpointError(
            f"{cursor.path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'"
        )
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(
            f"{cursor.path} is a big-endian GGUF; use the little-endian one, or convert the "
            "original checkpoint"
        )
    if version not in (2, 3):
        raise CheckpointError(
            f"{cursor.path} is GGUF version {version}; tierrun reads 2 and 3, so make it anew with "
            "a current llama.cpp"
        )


def _alignment(cursor: Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    is_power = isinstance(value, int) and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0
    if not is_power:
        raise CheckpointError(
            f"{cursor.path}: general.alignment is {value!r}, not a power of two; {_AGAIN}"
        )
    return int(value)


class _Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int


def _tensor(cursor: Cursor) -> _Entry:
    name = cursor.name("a tensor")
    rank = cursor.number("I", f"the dimensions of {name}")
    if not 0 < rank <= MAX_DIMENSIONS:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has {rank} dimensions, not 1 to {MAX_DIMENSIONS}; "
            f"{_AGAIN}"
        )
    shape = tuple(cursor.number("Q", f"the dimensions of {name}") for _ in range(rank))[::-1]
    number = cursor.number("I", f"the type of {name}")
    offset = cursor.number("Q", f"the offset of {name}")
    if number not in _types():
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has the type {number}, which gguf does not know; "
            "update gguf and tierrun, or use a file in another quantisation"
        )
    _check_shape(cursor, name, shape, _types()[number])
    return _Entry(name, shape, _types()[number], offset)


def _check_shape(cursor: Cursor, name: str, shape: tuple[int, ...], kind: GgmlType) -> None:
    if 0 in shape or prod(shape) >= 1 << 63:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has the impossible shape {list(shape)}; {_AGAIN}"
        )
    if shape[-1] % kind.block:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has rows of {shape[-1]}, which {kind.name} cannot "
            f"store (blocks of {kind.block}); {_AGAIN}"
        )


def _placed(cursor: Cursor, entries: list[_Entry], start: int) -> dict[str, GgufTensor]:
    """The tensors by name in file order, none outside the file, none over another."""
    tensors: dict[str, GgufTensor] = {}
    end, last = start, "the header"
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry.offset):
        if name in tensors:
            raise CheckpointError(f"{cursor.path}: tensor {name} appears twice; {_AGAIN}")
        extent = Extent(start + offset, prod(shape) // kind.block * kind.nbytes)
        if extent.offset < end:
            raise CheckpointError(f"{cursor.path}: tensor {name} lies over {last}; {_AGAIN}")
        if extent.end > cursor.size:
            raise CheckpointError(
                f"{cursor.path} is truncated: tensor {name} wants {extent.nbytes} bytes, the file "
                f"has {max(0, cursor.size - extent.offset)} of them; {_AGAIN}"
            )
        tensors[name] = GgufTensor(shape, kind, extent)
        end, last = extent.end, name
    return tensors
