"""Codecs that store numbers as they are: bf16, f16 and f32, row-major [out, in]."""

import torch

from tierrun.io.errors import StoreError
from tierrun.io.store import Matrix

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
"""Codec name → dtype of its elements."""

CODECS = {dtype: name for name, dtype in DTYPES.items()}
"""Dtype → the codec that stores it as it is."""

SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""safetensors' dtype names → torch's."""

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
"""torch's dtypes → safetensors' names."""


def matrix_view(record: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """The matrix inside a record's bytes (uint8 [record bytes]) as a typed view, nothing copied.

    Raises:
        StoreError: a codec that this tierrun does not compute with.
    """
    if matrix.codec not in DTYPES:
        raise StoreError(f"codec {matrix.codec} of {matrix.name} is unknown; update tierrun")
    data = record[matrix.extent.offset : matrix.extent.end]
    return data.view(DTYPES[matrix.codec]).view(matrix.shape)
