"""Random matrices in every codec, and random ggml blocks."""

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tierrun.engine.codecs.codec import ELEMENTS, Codec, Level, find_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import Fields, pack
from tierrun.engine.kernels.geometry import Geometry, dense_geometry, packed_geometry
from tierrun.tools.sources.ggml_blocks import CODECS

NAMES = (
    *CODECS.values(),
    "nvfp4",
    "nvfp4_div",
    "fp8_g128_f32",
    "fp8_row_f32",
    "int4_g128_bf16",
    "int4z_g32_f16",
    "int8_row_f32",
)
"""Every codec, and members of each family."""

_HALVES = {
    GGMLQuantizationType.Q2_K: (80, 82),
    GGMLQuantizationType.Q3_K: (108,),
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q5_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
    GGMLQuantizationType.Q4_1: (0, 2),
    GGMLQuantizationType.Q5_1: (0, 2),
    GGMLQuantizationType.MXFP4: (),
}
"""Where a block has halves; the others have one at 0."""

EXTREMES = (0x0000, 0x8000, 0x0001, 0x03FF, 0x8001, 0x7BFF, 0xFBFF, 0x0400, 0x3C00)
"""Halves at the edges: zeros, subnormals, the largest."""


def random_blocks(ggml_type: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random finite blocks, uint8 [rows, row bytes]; a third of their halves are extreme."""
    generator = torch.Generator().manual_seed(seed)
    kind = GGMLQuantizationType(ggml_type)
    block, nbytes = GGML_QUANT_SIZES[kind]
    count = rows * columns // block
    blocks = torch.randint(0, 256, (count, nbytes), dtype=torch.uint8, generator=generator)
    for offset in _HALVES.get(kind, (0,)):
        halves = torch.randn(count, generator=generator).to(torch.float16).view(torch.int16)
        picks = torch.randint(0, 3 * len(EXTREMES), (count,), generator=generator)
        for index, bits in enumerate(EXTREMES):
            halves[picks == index] = bits - 65536 if bits >= 32768 else bits
        blocks[:, offset : offset + 2] = halves.view(torch.uint8).view(count, 2)
    if kind == GGMLQuantizationType.MXFP4:
        blocks[:, 0] = torch.randint(0, 252, (count,), generator=generator)
    return blocks.view(rows, -1)


def random_fields(codec: Codec, rows: int, columns: int, seed: int = 0) -> Fields:
    """Random parts of a matrix whose values are of the order of one."""
    generator = torch.Generator().manual_seed(seed)

    def level(level: Level) -> torch.Tensor:
        groups = 1 if level.per is None else -(-columns // level.per)
        whole = {"u4": (0, 16), "u8": (0, 16), "i8": (-32, 32), "e8m0": (120, 128)}
        if level.element in whole:
            low, high = whole[level.element]
            return torch.randint(low, high, (rows, groups), generator=generator).to(
                ELEMENTS[level.element]
            )
        values = torch.rand(rows, groups, generator=generator) + 0.25
        return values.to(ELEMENTS[level.element])

    codes = torch.randint(0, 1 << codec.bits, (rows, columns), generator=generator)
    if codec.book == "e4m3":
        codes[(codes & 127) == 127] = 0  # NaN
    return Fields(
        codes.to(torch.uint8),
        tuple(map(level, codec.scale)),
        tuple(map(level, codec.minimum)),
        None if codec.zero_point is None else level(codec.zero_point),
    )


def random_packed(name: str, rows: int, columns: int, seed: int = 0) -> Packed:
    """A random matrix [rows, columns] in the codec `name`."""
    codec = find_codec(name)
    fields = random_fields(codec, rows, columns, seed)
    return Packed.over(pack(codec, fields), codec, (rows, columns))


def random_matrix(
    codec: str, shape: tuple[int, int], seed: int = 0
) -> tuple[Geometry, torch.Tensor, torch.Tensor]:
    """A random matrix: geometry, bytes, and its values in fp64."""
    if codec in DTYPES:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        values = values.to(DTYPES[codec])
        return dense_geometry(codec, shape), values.view(-1).view(torch.uint8), values.double()
    packed = random_packed(codec, *shape, seed)
    return packed_geometry(packed.codec, shape), packed.data, packed.dense().double()
