"""A GGUF header is read as gguf reads it, or refused in one line; it is never trusted."""

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.ggufs import (
    ARRAY,
    FIXTURES,
    STRING,
    UINT32,
    Tensor,
    array,
    gguf_bytes,
    pair,
    text,
)

from tierrun.io.errors import CheckpointError, TierrunError
from tierrun.tools.sources.gguf_header import read_gguf_header

ONE = [Tensor("a.weight")]
DATA = bytes(256)


def name_of(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/*.gguf")), ids=name_of)
def test_same_as_gguf(path: Path) -> None:
    header, reader = read_gguf_header(path), GGUFReader(path)
    keys = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert set(header.metadata) == keys
    for key in keys:
        assert header.metadata[key] == reader.fields[key].contents(), key
    assert len(header.tensors) == len(reader.tensors)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert ours.type.number == tensor.tensor_type
        assert ours.extent == (tensor.data_offset, tensor.n_bytes)


def huge(value: int) -> bytes:
    return struct.pack("<Q", value)


TWICE = pair("k", UINT32, bytes(4))
CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated: the magic number wants 4 bytes, the file has 0 left"),
    "magic": (gguf_bytes(magic=b"GGML"), "is not a GGUF file: it begins with b'GGML'"),
    "big endian": (gguf_bytes(order=">"), "is a big-endian GGUF"),
    "version 1": (gguf_bytes(version=1), "is GGUF version 1; tierrun reads 2 and 3"),
    "version 9": (gguf_bytes(version=9), "is GGUF version 9"),
    "many tensors": (gguf_bytes(num_tensors=1 << 62), "4611686018427387904 tensors in a file of"),
    "many keys": (gguf_bytes(num_pairs=1 << 63), "9223372036854775808 keys in a file of"),
    "more keys than are there": (gguf_bytes(num_pairs=1), "1 keys in a file of"),
    "long string": (
        gguf_bytes([pair("k", STRING, huge(1 << 60))], data=DATA),
        "k wants 1152921504606846976 bytes, the file has",
    ),
    "long key": (gguf_bytes([huge(1 << 40) + DATA]), "1099511627776 bytes in the name of a key"),
    "key not text": (gguf_bytes([pair(b"\xff", UINT32, DATA)]), "the name of a key is not text"),
    "key of two lines": (gguf_bytes([pair("a\nb", UINT32, DATA)]), "the name of a key is not text"),
    "key twice": (gguf_bytes([TWICE, TWICE]), "key k appears twice"),
    "value type": (gguf_bytes([pair("k", 13, DATA)]), "k has the unknown type 13"),
    "array type": (gguf_bytes([pair("k", ARRAY, array(77, 1, DATA))]), "k has the unknown type 77"),
    "nested array": (
        gguf_bytes([pair("k", ARRAY, array(ARRAY, 1, DATA))]),
        "k is an array of arrays",
    ),
    "long array": (
        gguf_bytes([pair("k", ARRAY, array(UINT32, 1 << 61, DATA))]),
        "2305843009213693952 elements of k in a file of",
    ),
    "alignment": (
        gguf_bytes([pair("general.alignment", UINT32, struct.pack("<I", 24))]),
        "general.alignment is 24, not a power of two",
    ),
    "no dimensions": (gguf_bytes([], [Tensor("a", ())], DATA), "tensor a has 0 dimensions"),
    "five dimensions": (
        gguf_bytes([], [Tensor("a", (1, 1, 1, 1, 32))], DATA),
        "tensor a has 5 dimensions, not 1 to 4",
    ),
    "empty dimension": (
        gguf_bytes([], [Tensor("a", (0, 32))], DATA),
        "tensor a has the impossible shape [0, 32]",
    ),
    "absurd dimension": (
        gguf_bytes([], [Tensor("a", (1 << 63, 1 << 63))], DATA),
        "tensor a has the impossible shape",
    ),
    "unknown type": (
        gguf_bytes([], [Tensor("a", kind=4711)], DATA),
        "tensor a has the type 4711, which gguf does not know",
    ),
    "ragged rows": (
        gguf_bytes([], [Tensor("a", (2, 33), kind=8)], DATA),
        "tensor a has rows of 33, which Q8_0 cannot store (blocks of 32)",
    ),
    "tensor twice": (
        gguf_bytes([], [*ONE, Tensor("a.weight", offset=256)], DATA * 2),
        "tensor a.weight appears twice",
    ),
    "overlap": (
        gguf_bytes([], [*ONE, Tensor("b", offset=128)], DATA * 2),
        "tensor b lies over a.weight",
    ),
    "truncated": (
        gguf_bytes([], ONE, DATA[:100]),
        "is truncated: tensor a.weight wants 256 bytes, the file has 100 of them",
    ),
    "outside": (
        gguf_bytes([], [Tensor("a", offset=1 << 62)], DATA),
        "is truncated: tensor a wants 256 bytes, the file has 0 of them",
    ),
    "header cut off": (
        gguf_bytes([], ONE, DATA)[:60],
        "is truncated: the type of a.weight wants 4 bytes, the file has 0 left",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, words = CASES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_gguf_header(path)
    message = str(caught.value)
    assert words in message and str(path) in message and "\n" not in message


def test_text_that_is_not_utf_8_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes([pair("k", STRING, text(b"a\xffb"))]))
    assert read_gguf_header(path).metadata == {"k": "a\ufffdb"}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A header as large as published ones: 150,000 tokens with 300,000 merges."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_token_list([f"token{number}" for number in range(150_000)])
    writer.add_token_merges([f"tok{number} en{number}" for number in range(300_000)])
    writer.add_token_types([1] * 150_000)
    for number in range(600):
        writer.add_tensor(f"blk.{number}.x", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_large_header_is_quick_and_small(large: Path) -> None:
    start = time.process_time()
    header = read_gguf_header(large)
    assert time.process_time() - start < 2
    assert len(header.metadata["tokenizer.ggml.merges"]) == 300_000
    tracemalloc.start()
    read_gguf_header(large)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


@pytest.fixture(scope="module")
def seed() -> bytes:
    """A small fixture's header, and the beginning of its data."""
    path = FIXTURES / "mixtral" / "mixtral.gguf"
    first = next(iter(read_gguf_header(path).tensors.values()))
    return path.read_bytes()[: first.extent.offset + 64]


@settings(max_examples=300)
@given(st.data())
def test_mutations_raise_only_our_errors(
    seed: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    mutant = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mutant)))
        piece = data.draw(st.binary(max_size=9))
        gone = data.draw(st.sampled_from([0, len(piece), len(mutant)]))
        mutant[place : place + gone] = piece
    check_bounded(bytes(mutant), tmp_path_factory.getbasetemp() / "mutant.gguf")


@given(st.binary(max_size=200))
@example(struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 21))
def test_any_bytes_raise_only_our_errors(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    check_bounded(b"GGUF" + tail, tmp_path_factory.getbasetemp() / "any.gguf")


def check_bounded(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        read_gguf_header(path)
    except TierrunError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20
