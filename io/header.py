"""The safetensors header, read with every number bounded and written page-aligned.

Format (https://github.com/huggingface/safetensors): an 8-byte little-endian length, that many bytes
of JSON, then the tensors back to back.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tierrun.io.errors import CorruptError
from tierrun.io.extent import PAGE, Extent, align_up

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own bound: a larger header is an attack or garbage."""

MAX_DIMENSIONS = 64
"""torch's own bound."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """One tensor of a safetensors file; `extent` is absolute in the file."""

    dtype: str
    shape: tuple[int, ...]
    extent: Extent


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of the safetensors file at `path`, in file order.

    Raises:
        CorruptError: if any number in the header contradicts the file.
        OSError: if the file cannot be opened or read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(path, file.read(8), size)
        raw = file.read(length)
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: the header is not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise CorruptError(f"{path}: the header is not a JSON object")
    entries.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor(path, name, entry, start, size) for name, entry in entries.items()}
    return dict(sorted(tensors.items(), key=lambda item: item[1].extent.offset))


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CorruptError(f"{path}: {size} bytes is too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CorruptError(f"{path}: header of {length} bytes in a file of {size}; truncated?")
    return int(length)


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(_number(n) for n in entry["shape"])
        begin, end = (_number(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CorruptError(f"{path}: malformed header entry for tensor {name}") from None
    if len(shape) > MAX_DIMENSIONS:
        raise CorruptError(f"{path}: tensor {name} has {len(shape)} dimensions")
    if not (begin <= end and start + end <= size):
        raise CorruptError(
            f"{path}: tensor {name} ends at byte {start + end}, the file has {size}; truncated?"
        )
    wanted = DTYPE_BYTES.get(dtype)
    count = 1
    for n in shape:
        count *= n
    if wanted is not None and count * wanted != end - begin:
        raise CorruptError(
            f"{path}: tensor {name} of {dtype} {list(shape)} wants {count * wanted} bytes, "
            f"has {end - begin}"
        )
    return TensorInfo(dtype, shape, Extent(start + begin, end - begin))


def _number(value: Any) -> int:
    """`value` where it could be a size: a JSON integer of at most 63 bits, not negative."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError
    return value


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Extent]]:
    """The header of a file holding `tensors` (name → dtype, shape, bytes) in the given order.

    Padded with spaces, as the format allows, so that the first tensor starts on a page boundary.
    Returns the header's bytes and each tensor's absolute extent.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        end = offset + nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    body = json.dumps(entries, separators=(",", ":")).encode()
    start = align_up(8 + len(body), PAGE)
    header = struct.pack("<Q", start - 8) + body.ljust(start - 8, b" ")
    extents = {
        name: Extent(start + entry["data_offsets"][0], tensors[name][2])
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    return header, extents
