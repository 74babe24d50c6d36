"""GGUF's block types taken apart into codes, scales and minima; nothing is lost or rounded.

The layouts are those of ggml-common.h and of `gguf.quants`, whose dequantiser the tests compare
with bit for bit.
"""

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tierrun.engine.codecs.planes import Fields

_Type = GGMLQuantizationType
_QK = 256


def row_bytes(ggml_type: int, columns: int) -> int:
    """Bytes of a row of `columns` numbers; `columns` is a multiple of the type's block."""
    block, nbytes = GGML_QUANT_SIZES[_Type(ggml_type)]
    return columns // block * nbytes


def fields(ggml_type: int, raw: torch.Tensor) -> Fields:
    """Rows `raw` (uint8 [rows, row bytes]) of a type in `CODECS`, in the fields of its codec."""
    _, nbytes = GGML_QUANT_SIZES[_Type(ggml_type)]
    blocks = raw.reshape(-1, nbytes)
    parts = _TAKE_APART[_Type(ggml_type)](blocks)
    rows = raw.shape[0]
    return Fields(
        parts.codes.reshape(rows, -1),
        tuple(level.reshape(rows, -1) for level in parts.scale),
        tuple(level.reshape(rows, -1) for level in parts.minimum),
    )


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The half at byte `offset` of every block, f16 [blocks, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16)


def _nibbles(packed: torch.Tensor, run: int) -> torch.Tensor:
    """Bytes whose low halves are `run` codes and whose high halves the next `run`."""
    bytes_ = packed.reshape(len(packed), -1, run)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=2).flatten(1)


def _pairs(packed: torch.Tensor, run: int) -> torch.Tensor:
    """Bytes whose four bit pairs, from the low one up, are four runs of `run` codes."""
    bytes_ = packed.reshape(len(packed), -1, run)
    return torch.stack([(bytes_ >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)


def _bits(packed: torch.Tensor, run: int) -> torch.Tensor:
    """Bytes whose eight bits, from the low one up, belong to eight runs of `run` codes."""
    bytes_ = packed.reshape(len(packed), -1, run)
    return torch.stack([(bytes_ >> shift) & 1 for shift in range(8)], dim=2).flatten(1)


def _q8_0(b: torch.Tensor) -> Fields:
    return Fields(b[:, 2:] ^ 128, (_half(b, 0),))


def _q4_0(b: torch.Tensor) -> Fields:
    return Fields(_nibbles(b[:, 2:], 16), (_half(b, 0),))


def _q4_1(b: torch.Tensor) -> Fields:
    return Fields(_nibbles(b[:, 4:], 16), (_half(b, 0),), (-_half(b, 2),))


def _q5_0(b: torch.Tensor) -> Fields:
    return Fields(_nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6]) << 4, (_half(b, 0),))


def _q5_1(b: torch.Tensor) -> Fields:
    codes = _nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8]) << 4
    return Fields(codes, (_half(b, 0),), (-_half(b, 2),))


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Bit i of a little-endian word belongs to code i."""
    return torch.stack([(packed >> shift) & 1 for shift in range(8)], dim=2).flatten(1)


def _q2_k(b: torch.Tensor) -> Fields:
    both, codes = b[:, :16], _pairs(b[:, 16:80], 32)
    return Fields(codes, (both & 15, _half(b, 80)), (both >> 4, _half(b, 82)))


def _q3_k(b: torch.Tensor) -> Fields:
    codes = _pairs(b[:, 32:96], 32) | _bits(b[:, :32], 32) << 2
    low = torch.cat((b[:, 96:104] & 15, b[:, 96:104] >> 4), dim=1)
    high = torch.cat([(b[:, 104:108] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    scale = (low | high << 4).to(torch.int8) - 32
    return Fields(codes, (scale, _half(b, 108)))


def _q4_k(b: torch.Tensor) -> Fields:
    scale, minimum = _six_bits(b[:, 4:16])
    return Fields(_nibbles(b[:, 16:], 32), (scale, _half(b, 0)), (minimum, _half(b, 2)))


def _q5_k(b: torch.Tensor) -> Fields:
    scale, minimum = _six_bits(b[:, 4:16])
    codes = _nibbles(b[:, 48:], 32) | _bits(b[:, 16:48], 32) << 4
    return Fields(codes, (scale, _half(b, 0)), (minimum, _half(b, 2)))


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of six bits, from twelve bytes."""
    d, m, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat((d & 63, (high & 15) | (d >> 2 & 48)), dim=1)
    minimum = torch.cat((m & 63, (high >> 4) | (m >> 2 & 48)), dim=1)
    return scale, minimum


def _q6_k(b: torch.Tensor) -> Fields:
    codes = _nibbles(b[:, :128], 64) | _pairs(b[:, 128:192], 32) << 4
    return Fields(codes, (b[:, 192:208].view(torch.int8), _half(b, 208)))


def _iq4_xs(b: torch.Tensor) -> Fields:
    low = torch.stack((b[:, 4:8] & 15, b[:, 4:8] >> 4), dim=2).flatten(1)
    high = torch.stack([(b[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    scale = (low | high << 4).to(torch.int8) - 32
    return Fields(_nibbles(b[:, 8:], 16), (scale, _half(b, 0)))


def _mxfp4(b: torch.Tensor) -> Fields:
    return Fields(_nibbles(b[:, 1:], 16), (b[:, :1],))


_TAKE_APART: dict[_Type, Callable[[torch.Tensor], Fields]] = {
    _Type.Q8_0: _q8_0,
    _Type.Q4_0: _q4_0,
    _Type.Q4_1: _q4_1,
    _Type.Q5_0: _q5_0,
    _Type.Q5_1: _q5_1,
    _Type.Q2_K: _q2_k,
    _Type.Q3_K: _q3_k,
    _Type.Q4_K: _q4_k,
    _Type.Q5_K: _q5_k,
    _Type.Q6_K: _q6_k,
    _Type.IQ4_NL: _q4_0,
    _Type.IQ4_XS: _iq4_xs,
    _Type.MXFP4: _mxfp4,
}

CODECS: dict[int, str] = {int(ggml_type): ggml_type.name.lower() for ggml_type in _TAKE_APART}
"""ggml type → the codec that holds the same numbers."""
