"""safetensors headers: readable by others, and no number in them is believed unchecked."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tierrun.io.errors import CorruptError
from tierrun.io.extent import PAGE
from tierrun.io.header import build_header, read_header


def write(path: Path, entries: Any, data: bytes = bytes(64)) -> Path:
    body = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes


def test_safetensors_reads_what_is_built(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.int32).view(2, 3), "b": torch.rand(5)}
    layout = {"a": ("I32", (2, 3), 24), "b": ("F32", (5,), 20)}
    header, extents = build_header(layout, {"format": "pt"})
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    (tmp_path / "x").write_bytes(header + data)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert {name: info.extent for name, info in read_header(tmp_path / "x").items()} == extents


def test_what_safetensors_wrote_is_read(tmp_path: Path) -> None:
    tensors = {
        "z": torch.rand(3, 5),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(2.5),
        "half": torch.rand(9).to(torch.bfloat16),
        "eighth": torch.rand(9).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x", {"format": "pt"})
    raw = (tmp_path / "x").read_bytes()
    found = read_header(tmp_path / "x")
    assert found.keys() == tensors.keys()
    offsets = [info.extent.offset for info in found.values()]
    assert offsets == sorted(offsets), "not in file order"
    for name, tensor in tensors.items():
        info = found[name]
        assert info.shape == tuple(tensor.shape)
        stored = raw[info.extent.offset : info.extent.end]
        assert stored == tensor.flatten().view(torch.uint8).numpy().tobytes()


@given(names=st.lists(st.text(), unique=True, max_size=5), nbytes=st.integers(0, 3 * PAGE))
def test_data_begins_on_a_page(names: list[str], nbytes: int) -> None:
    layout = {f"t{name}": ("U8", (nbytes,), nbytes) for name in names}
    header, extents = build_header(layout, {})
    assert len(header) % PAGE == 0
    assert [extent.offset for extent in extents.values()] == [
        len(header) + nbytes * index for index in range(len(names))
    ]


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        (b"not json", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        ({"t": 1}, "malformed"),
        ({"t": {}}, "malformed"),
        ({"t": {"dtype": "F32"}}, "malformed"),
        ({"t": entry(shape="4")}, "malformed"),
        ({"t": entry(shape=None)}, "malformed"),
        ({"t": entry(data_offsets=[0, 8, 16])}, "malformed"),
        (b'{"t": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}', "malformed"),
        (b'{"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, NaN]}}', "malformed"),
        ({"t": entry(shape=[10**4000] * 3)}, "malformed"),
        ({"t": entry(shape=[10**18] * 64)}, "wants"),
        ({"t": entry(data_offsets=[0, 10**4000])}, "malformed"),
        ({"t": entry(data_offsets=[0, 1 << 40])}, "truncated"),
        ({"t": entry(data_offsets=[16, 0])}, "truncated"),
        ({"t": entry(data_offsets=[-16, 0])}, "malformed"),
        ({"t": entry(shape=[-4])}, "malformed"),
        ({"t": entry(shape=[4.0])}, "malformed"),
        ({"t": entry(shape=[1] * 65)}, "65 dimensions"),
        ({"t": entry(shape=[5])}, "wants 20 bytes, has 16"),
        ({"t": entry(dtype="F64")}, "wants 32 bytes, has 16"),
    ],
)
def test_a_wrong_header_is_corrupt_and_says_how(
    entries: Any, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(CorruptError, match=complaint) as caught:
        read_header(write(tmp_path / "bad.safetensors", entries))
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"1234567", struct.pack("<Q", 1 << 60), struct.pack("<Q", 3) + b"{}"]
)
def test_a_file_shorter_than_its_header_is_corrupt(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(raw)
    with pytest.raises(CorruptError):
        read_header(tmp_path / "short")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", {"t": entry()}, bytes(16)).read_bytes()
    assert list(read_header(tmp_path / "whole")) == ["t"]
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(CorruptError):
            read_header(tmp_path / "cut")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
numbers = st.integers(-5, 70) | st.integers() | json_values
entries_like = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "Q9"]) | json_values,
        "shape": st.lists(numbers, max_size=3) | json_values,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | json_values,
    }
)


@given(entries=st.dictionaries(st.text(max_size=3), entries_like | json_values, max_size=3))
@settings(max_examples=300)
def test_a_header_of_anything_is_within_its_file_or_corrupt(entries: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "x", entries)
    try:
        tensors = read_header(path)
    except CorruptError:
        return
    for info in tensors.values():
        assert 0 <= info.extent.offset <= info.extent.end <= path.stat().st_size
        assert all(n >= 0 for n in info.shape)


@given(data=st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_within_its_bounds_or_corrupt(
    data: st.DataObject, tmp_path: Path
) -> None:
    raw = bytearray(write(tmp_path / "x", {"t": entry(), "u": entry()}).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 65))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(raw)
    try:
        tensors = read_header(tmp_path / "x")
    except CorruptError:
        return
    assert all(info.extent.end <= len(raw) for info in tensors.values())
