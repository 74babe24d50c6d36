"""Codecs hold exactly the numbers of the formats they repack, in hardly more bytes."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.codecs import NAMES, random_blocks, random_fields, random_packed

from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.expand import dequantise
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import Fields, pack, pack_planes, packed_bytes, planes
from tierrun.io.errors import CorruptError, StoreError
from tierrun.tools.sources.ggml_blocks import CODECS, fields


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Bit patterns, so that NaN equals itself; a zero has no sign."""
    return (values + 0.0).view(torch.int32)


@pytest.mark.parametrize("ggml_type", CODECS)
@pytest.mark.parametrize("shape", [(64, 512), (33, 256), (5, 768)])
def test_ggml_blocks_are_kept_bit_for_bit(ggml_type: int, shape: tuple[int, int]) -> None:
    raw = random_blocks(ggml_type, *shape, seed=shape[0])
    theirs = torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType(ggml_type)).copy())
    codec, parts = find_codec(CODECS[ggml_type]), fields(ggml_type, raw)
    packed = Packed.over(pack(codec, parts), codec, shape)
    assert torch.equal(_bits(dequantise(codec, parts)), _bits(theirs))
    assert torch.equal(_bits(packed.dense()), _bits(theirs))


@pytest.mark.parametrize("ggml_type", CODECS)
def test_repacking_grows_a_matrix_by_four_per_cent_at_most(ggml_type: int) -> None:
    raw = random_blocks(ggml_type, 96, 2048)
    assert packed_bytes(find_codec(CODECS[ggml_type]), (96, 2048)) <= 1.04 * raw.numel()


def test_native_formats_grow_by_four_per_cent_at_most() -> None:
    shape = (768, 2048)
    weights = shape[0] * shape[1]
    assert packed_bytes(find_codec("fp8_g128_f32"), shape) <= 1.04 * weights * (1 + 4 / 128**2)
    assert packed_bytes(find_codec("nvfp4"), shape) <= 1.04 * weights * (0.5 + 1 / 16)
    assert packed_bytes(find_codec("mxfp4"), shape) <= 1.04 * weights * (0.5 + 1 / 32)
    assert packed_bytes(find_codec("int4_g128_bf16"), shape) <= 1.04 * weights * (0.5 + 2 / 128)
    asymmetric = packed_bytes(find_codec("int4z_g128_bf16"), shape)
    assert asymmetric <= 1.04 * weights * (0.5 + 2 / 128 + 0.5 / 128)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 256), (1, 256), (70, 512), (32, 768)])
def test_planes_hold_what_the_formula_gives(name: str, shape: tuple[int, int]) -> None:
    codec = find_codec(name)
    parts = random_fields(codec, *shape)
    packed = Packed.over(pack(codec, parts), codec, shape)
    values = dequantise(codec, parts)
    assert torch.equal(packed.dense(), values)
    ids = torch.randint(0, shape[0], (9,))
    assert torch.equal(packed.rows(ids), values[ids])


@pytest.mark.parametrize(
    "name", ["fp8_g128_f32", "int4_g128_bf16", "int8_row_f32", "int4z_g32_f16"]
)
@pytest.mark.parametrize("columns", [4, 100, 130, 300])
def test_a_last_group_may_be_shorter(name: str, columns: int) -> None:
    codec = find_codec(name)
    parts = random_fields(codec, 40, columns)
    packed = Packed.over(pack(codec, parts), codec, (40, columns))
    assert torch.equal(packed.dense(), dequantise(codec, parts))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_range_of_tiles_expands_alike(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    rows = data.draw(st.integers(1, 130))
    packed = random_packed(name, rows, 256, seed=rows)
    first = 32 * data.draw(st.integers(0, (rows - 1) // 32))
    stops = [*range(first + 32, rows, 32), rows]
    last = data.draw(st.sampled_from(stops))
    out = torch.full((packed.padded_columns * (last - first),), float("nan"))
    assert torch.equal(packed.expand(first, last, out).T, packed.dense()[first:last])


@pytest.mark.parametrize("name", NAMES)
def test_planes_of_tiles_can_be_joined(name: str) -> None:
    codec = find_codec(name)
    parts = random_fields(codec, 100, 256)
    chunks = [
        pack_planes(codec, Fields(
            parts.codes[first : first + 32],
            tuple(level[first : first + 32] for level in parts.scale),
            tuple(level[first : first + 32] for level in parts.minimum),
            None if parts.zero_point is None else parts.zero_point[first : first + 32],
        ))
        for first in range(0, 100, 32)
    ]  # fmt: skip
    whole = pack(codec, parts)
    for index, plane in enumerate(planes(codec, 100, 256)):
        joined = torch.cat([chunk[index] for chunk in chunks])
        assert torch.equal(joined, whole[plane.offset : plane.offset + plane.nbytes])


def test_scales_reach_every_exponent() -> None:
    codec = find_codec("mxfp4")
    exponents = torch.arange(255, dtype=torch.uint8)[:, None]
    parts = Fields(torch.full((255, 32), 2, dtype=torch.uint8), (exponents,))
    expected = np.ldexp(np.float32(1), np.arange(255) - 127).astype(np.float32)
    got = Packed.over(pack(codec, parts), codec, (255, 32)).dense()
    assert got[:, 0].tolist() == expected.tolist()


def test_an_unknown_codec_is_named() -> None:
    for name in ("q9_k", "int4_g0_bf16", "fp8_g128_f99"):
        with pytest.raises(StoreError, match=name):
            find_codec(name)


def test_bytes_of_another_length_are_refused() -> None:
    codec = find_codec("q4_0")
    with pytest.raises(CorruptError, match="needs 1152 bytes, not 1000"):
        Packed.over(torch.zeros(1000, dtype=torch.uint8), codec, (64, 32))
