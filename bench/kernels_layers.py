"""Layers whose products are measured: experts of real models, and matrices by themselves."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tierrun.bench.random_weights import generator, matrix_bytes, matrix_nbytes
from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.gpu.layout import ExpertLayout
from tierrun.engine.gpu.weights import geometry_of
from tierrun.engine.kernels.geometry import Geometry
from tierrun.engine.kernels.matmul import Operand
from tierrun.engine.kernels.matvec import Gate
from tierrun.io.errors import UsageError
from tierrun.io.extent import Extent, align_up
from tierrun.io.store import Matrix

_MOST = 1 << 20
"""Of any dimension."""

_EXPERTS = re.compile(r"^(\d+)x(\d+):(\d+)/(\d+)$")
_MATRIX = re.compile(r"^(\d+)x(\d+)$")


class Layer(NamedTuple):
    """A layer's experts, gate, up and down each; or (no experts) one matrix [inner, hidden]."""

    name: str
    hidden: int
    inner: int
    experts: int = 0
    top_k: int = 0

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """[out, in] of an expert's two matrices, gate and up being one; or of the one matrix."""
        if not self.experts:
            return ((self.inner, self.hidden),)
        return (2 * self.inner, self.hidden), (self.hidden, self.inner)

    @property
    def weights(self) -> int:
        """Of one expert, or of the matrix."""
        return sum(rows * columns for rows, columns in self.shapes)

    @property
    def alone(self) -> "Layer":
        """With one expert, which every token takes; one matrix is that already."""
        return self._replace(experts=1, top_k=1) if self.experts else self

    def flops(self, tokens: int) -> int:
        """Of so many tokens."""
        return 2 * tokens * max(1, self.top_k) * self.weights


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("granite-3.1-1b-a400m", 1024, 512, 32, 8),
        Layer("qwen3.6-35b-a3b", 2048, 512, 256, 8),
        Layer("qwen3-30b-a3b", 2048, 768, 128, 8),
        Layer("gpt-oss-120b", 2880, 2880, 128, 4),
        Layer("minimax-m2", 3072, 1536, 256, 8),
        Layer("mixtral-8x7b", 4096, 14336, 8, 2),
        Layer("glm-5", 6144, 2048, 256, 8),
    )
}


def parse_layer(text: str) -> Layer:
    """A model's name; `2048x512:8/256` (hidden, inner, top-k of experts); `4096x14336` (a matrix).

    Raises:
        UsageError: anything else, or dimensions that no codec packs.
    """
    if text in LAYERS:
        return LAYERS[text]
    match = _EXPERTS.match(text) or _MATRIX.match(text)
    if match is None:
        raise UsageError(
            f"--layers {text}: name {', '.join(LAYERS)}, experts (2048x512:8/256) or a matrix "
            "(inputs and outputs, 4096x14336)"
        )
    hidden, inner, top_k, experts = (int(part) for part in (*match.groups(), 0, 0)[:4])
    if hidden % 32 or inner % 32 or not 0 < hidden <= _MOST or not 0 < inner <= _MOST:
        raise UsageError(f"--layers {text}: dimensions come in multiples of 32, up to {_MOST}")
    if match.re is _EXPERTS and not 0 < top_k <= experts <= 1024:
        raise UsageError(f"--layers {text}: top-k is from 1 to the number of experts, at most 1024")
    return Layer(text, hidden, inner, experts, top_k)


class Record(NamedTuple):
    """One expert of a layer in a codec, or the one matrix, as it is stored; random."""

    layer: Layer
    codec: str
    data: torch.Tensor
    matrices: tuple[Matrix, ...]

    @property
    def alone(self) -> "Record":
        """The same of a layer that has no other expert."""
        return self._replace(layer=self.layer.alone)

    @property
    def packed_bytes(self) -> int:
        """Without what lies between and behind the matrices."""
        return sum(matrix.extent.nbytes for matrix in self.matrices)

    @property
    def geometry(self) -> Geometry:
        """Of the first matrix."""
        return geometry(self.codec, self.matrices[0].shape)

    @property
    def layout(self) -> ExpertLayout:
        """Where an expert's matrices are."""
        return make_layout(self.layer, self.codec)


def make_record(layer: Layer, codec: str) -> Record:
    """Raises StoreError: no such codec."""
    extents = _extents(layer, codec)
    data = torch.zeros(align_up(extents[-1].end), dtype=torch.uint8)
    for extent, shape in zip(extents, layer.shapes, strict=True):
        data[extent.offset : extent.end] = matrix_bytes(codec, shape, generator(1))
    names = ("gate_up_proj", "down_proj") if layer.experts else ("weight",)
    parts = zip(names, layer.shapes, extents, strict=True)
    matrices = tuple(Matrix(name, codec, shape, extent) for name, shape, extent in parts)
    return Record(layer, codec, data, matrices)


def make_layout(layer: Layer, codec: str) -> ExpertLayout:
    """Of the experts of `layer` in `codec`."""
    first, down = (
        Operand(geometry(codec, shape), extent.offset)
        for shape, extent in zip(layer.shapes, _extents(layer, codec), strict=True)
    )
    return ExpertLayout((first,), down, Gate("silu"))


def record_nbytes(layer: Layer, codec: str) -> int:
    """What `make_record` will take."""
    return align_up(_extents(layer, codec)[-1].end)


def _extents(layer: Layer, codec: str) -> list[Extent]:
    extents, offset = list[Extent](), 0
    for shape in layer.shapes:
        extents.append(Extent(offset, matrix_nbytes(codec, shape)))
        offset = align_up(extents[-1].end, 64)
    return extents


def geometry(codec: str, shape: Sequence[int]) -> Geometry:
    """The matrix [out, in] in a codec, a dense one or a packed one."""
    kind = DTYPES[codec] if codec in DTYPES else find_codec(codec)
    return geometry_of(kind, tuple(shape))


def choose(layer: Layer, tokens: int) -> torch.Tensor:
    """What a router without preferences chooses, int64 [tokens, top-k]; the same at every call.

    One matrix is one expert: every token chooses it.
    """
    if not layer.experts:
        return torch.zeros(tokens, 1, dtype=torch.int64)
    random = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, layer.experts, generator=random).topk(layer.top_k).indices


def fill(memory: torch.Tensor, record: Record) -> torch.Tensor:
    """`memory` (uint8) full of copies of `record`, uint8 [records, record bytes]."""
    nbytes = len(record.data)
    records = memory[: len(memory) // nbytes * nbytes].view(-1, nbytes)
    records.copy_(record.data.to(memory.device).expand_as(records))
    return records
