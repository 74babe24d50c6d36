"""Writing the checkpoint of a synthetic Mixture of Experts, as fast as the disk takes it."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Qwen3MoeConfig

from tierrun.io.errors import UsageError
from tierrun.io.extent import format_bytes
from tierrun.io.header import build_header

_SHARD_BYTES = 2 << 30
_CONTEXT = 40960
_STRIDE = 4099
"""Elements (a prime) between the windows of two matrices in the random buffer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The model's dimensions; the defaults give 6.2 GiB of experts in records of 9.4 MB."""

    layers: int = 11
    experts: int = 64
    top_k: int = 8
    hidden: int = 2048
    intermediate: int = 768
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 4096
    sigma: float = 2.1

    @property
    def rms(self) -> float:
        """Of an embedding row: H normal dimensions, one of them replaced by 8."""
        return math.sqrt((64 + self.hidden) / self.hidden)


class Weight(NamedTuple):
    """A tensor of the checkpoint and what it holds: ones, embedding, router, or noise."""

    name: str
    shape: tuple[int, ...]
    kind: str = "noise"

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)


def weights(shape: Shape) -> Iterator[Weight]:
    """Every tensor of the checkpoint, in file order."""
    yield Weight("model.embed_tokens.weight", (shape.vocabulary, shape.hidden), "embedding")
    for layer in range(shape.layers):
        yield from _layer_weights(shape, f"model.layers.{layer}")
    yield Weight("model.norm.weight", (shape.hidden,), "ones")
    yield Weight("lm_head.weight", (shape.vocabulary, shape.hidden))


def _layer_weights(shape: Shape, layer: str) -> Iterator[Weight]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield Weight(f"{layer}.self_attn.{name}.weight", (rows, shape.hidden))
    yield Weight(f"{layer}.self_attn.o_proj.weight", (shape.hidden, queries))
    for name, size in (
        ("self_attn.q_norm", shape.head_dim),
        ("self_attn.k_norm", shape.head_dim),
        ("input_layernorm", shape.hidden),
        ("post_attention_layernorm", shape.hidden),
    ):
        yield Weight(f"{layer}.{name}.weight", (size,), "ones")
    yield Weight(f"{layer}.mlp.gate.weight", (shape.experts, shape.hidden), "router")
    for expert in range(shape.experts):
        for name in ("gate_proj", "up_proj"):
            path = f"{layer}.mlp.experts.{expert}.{name}.weight"
            yield Weight(path, (shape.intermediate, shape.hidden))
        path = f"{layer}.mlp.experts.{expert}.down_proj.weight"
        yield Weight(path, (shape.hidden, shape.intermediate))


class WeightMaker:
    """Makes the values of each weight from one seed.

    The embedding and the routers must be made in file order; the others in any.
    """

    def __init__(self, shape: Shape, seed: int) -> None:
        self._shape = shape
        self._random = torch.Generator().manual_seed(seed)
        noise = [weight for weight in weights(shape) if weight.kind == "noise"]
        size = max(math.prod(weight.shape) for weight in noise) + _STRIDE * len(noise)
        self._buffer = (self._normal(size) * 0.02).to(torch.bfloat16)
        self._first = {weight.name: _STRIDE * i for i, weight in enumerate(noise)}

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self._random)

    def make(self, weight: Weight) -> torch.Tensor:
        """bf16, flat."""
        if weight.kind == "ones":
            return torch.ones(weight.shape, dtype=torch.bfloat16)
        if weight.kind == "embedding":
            return self._embedding(weight)
        if weight.kind == "router":
            return self._router(weight)
        first = self._first[weight.name]
        return self._buffer[first : first + math.prod(weight.shape)]

    def _embedding(self, weight: Weight) -> torch.Tensor:
        rows = self._normal(*weight.shape)
        rows[:, 0] = 8.0
        return rows.to(torch.bfloat16).flatten()

    def _router(self, weight: Weight) -> torch.Tensor:
        shape = self._shape
        rows = self._normal(*weight.shape) * (shape.rms / math.sqrt(shape.hidden))
        rows[:, 0] = shape.sigma * self._normal(shape.experts) * (shape.rms / 8)
        return rows.to(torch.bfloat16).flatten()


def build_checkpoint(directory: Path, shape: Shape, seed: int = 0) -> int:
    """Write the checkpoint; returns the bytes of its weights.

    Raises:
        UsageError: no room for it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    total = sum(weight.nbytes for weight in weights(shape))
    _check_space(directory, total)
    maker = WeightMaker(shape, seed)
    groups = _shards(shape)
    places: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_shard(directory / name, group, maker)
        places |= {weight.name: name for weight in group}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config_of(shape).save_pretrained(directory)
    return total


def _check_space(directory: Path, nbytes: int) -> None:
    replaced = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    free = shutil.disk_usage(directory).free + replaced
    if free < nbytes:
        raise UsageError(
            f"{directory} has {format_bytes(free)} free, the checkpoint needs "
            f"{format_bytes(nbytes)} (and its store as much again)"
        )


def _shards(shape: Shape) -> list[list[Weight]]:
    groups: list[list[Weight]] = [[]]
    nbytes = 0
    for weight in weights(shape):
        if nbytes + weight.nbytes > _SHARD_BYTES:
            groups.append([])
            nbytes = 0
        groups[-1].append(weight)
        nbytes += weight.nbytes
    return groups


def _write_shard(path: Path, group: list[Weight], maker: WeightMaker) -> None:
    tensors = {weight.name: ("BF16", weight.shape, weight.nbytes) for weight in group}
    header, extents = build_header(tensors, {"format": "pt"})
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, header, 0)
        for weight in group:
            data = maker.make(weight).view(torch.uint8).numpy().data
            assert os.pwrite(descriptor, data, extents[weight.name].offset) == weight.nbytes
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def config_of(shape: Shape, **more: str) -> Qwen3MoeConfig:
    """The configuration of a Qwen3-MoE of that shape; `more` is written into it as it is."""
    build: Callable[..., Qwen3MoeConfig] = Qwen3MoeConfig  # its stub lacks head_dim
    return build(
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=False,
        **more,
    )
