"""Codecs that store numbers as they are: bf16, f16 and f32, row-major [out, in]."""

import torch

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
