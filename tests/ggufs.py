"""GGUF files made by hand, truthful or not, and the fixtures' with their tensors in other types."""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from tierrun.tools.sources.gguf_header import GgufHeader, read_gguf_header

FIXTURES = Path(__file__).parent / "fixtures" / "gguf"
STRING, ARRAY, UINT32, INT32, FLOAT32, BOOL = 8, 9, 4, 5, 6, 7


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def metadata_pair(key: str, value: Any) -> bytes:
    """`key` with a string, number, bool or list as the file has it."""
    if isinstance(value, list):
        kind, data = _typed(value[0] if value else 0)
        return pair(key, ARRAY, array(kind, len(value), b"".join(_typed(v)[1] for v in value)))
    return pair(key, *_typed(value))


def _typed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        return STRING, text(value)
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value)
    return (UINT32, struct.pack("<I", value)) if value >= 0 else (INT32, struct.pack("<i", value))


class Tensor(NamedTuple):
    """An entry of the header: `shape` as torch says it, `offset` from the start of the data."""

    name: str | bytes
    shape: Sequence[int] = (2, 32)
    kind: int = 0
    offset: int = 0

    def entry(self) -> bytes:
        dimensions = struct.pack(f"<{len(self.shape)}Q", *self.shape[::-1])
        tail = struct.pack("<IQ", self.kind, self.offset)
        return text(self.name) + struct.pack("<I", len(self.shape)) + dimensions + tail


def gguf_bytes(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_pairs: int | None = None,
    order: str = "<",
) -> bytes:
    """A file; the numbers of things are those given, or true."""
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(pairs) if num_pairs is None else num_pairs,
    )
    entries = b"".join(tensor.entry() for tensor in tensors)
    header = magic + struct.pack(f"{order}IQQ", version, *counts) + b"".join(pairs) + entries
    return header + bytes(-len(header) % 32) + data


def model_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Any, int]]) -> bytes:
    """A whole model: tensors as (raw rows in the type's bytes or numbers, type) by name."""
    from gguf import GGML_QUANT_SIZES

    entries, data = [], b""
    for name, (values, kind) in tensors.items():
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        columns = values.nbytes // int(np.prod(values.shape[:-1])) // nbytes * block
        entries.append(Tensor(name, (*values.shape[:-1], columns), kind, len(data)))
        data += values.tobytes()
        data += bytes(-len(data) % 32)
    return gguf_bytes([metadata_pair(*item) for item in metadata.items()], entries, data)


def read_values(path: Path, header: GgufHeader) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of an F32 file."""
    raw = path.read_bytes()
    return {
        name: np.frombuffer(raw, np.float32, tensor.extent.nbytes // 4, tensor.extent.offset)
        .reshape(tensor.shape)
        .copy()
        for name, tensor in header.tensors.items()
    }


def spoilt(
    name: str,
    out: Path,
    *,
    metadata: Callable[[dict[str, Any]], None] = lambda _: None,
    kinds: Callable[[str], int] = lambda _: 0,
    tensors: Callable[[dict[str, tuple[Any, int]]], None] = lambda _: None,
) -> Path:
    """The fixture `name` written to `out`: matrices in the types that `kinds` says, changed."""
    (path,) = (FIXTURES / name).glob("*.gguf")
    header = read_gguf_header(path)
    found: dict[str, tuple[Any, int]] = {}
    for tensor, values in read_values(path, header).items():
        kind = kinds(tensor) if values.ndim > 1 and values.shape[-1] % 32 == 0 else 0
        found[tensor] = (quantize(values, GGMLQuantizationType(kind)) if kind else values, kind)
    said = dict(header.metadata)
    metadata(said)
    tensors(found)
    out.write_bytes(model_bytes(said, found))
    return out
