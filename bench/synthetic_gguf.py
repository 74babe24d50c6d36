"""A synthetic Mixture of Experts as a GGUF file, for llama.cpp; written a tensor at a time.

Embedding, routers and norms are those of the checkpoint (`tierrun.bench.checkpoint`) of the same
shape and seed; in bf16 every other matrix is too. In a quantised type these hold random codes with
constant scales, of which a value's standard deviation is 0.02, in windows of one random buffer.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.bench.checkpoint import Shape, Weight, WeightMaker, config_of, weights
from tierrun.bench.random_weights import DEVIATION
from tierrun.io.errors import UsageError

_Bytes = NDArray[np.uint8]
_STRIDE = 4099
"""Blocks (a prime) between the windows of two matrices in the random buffer."""

_RESIDENT = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


class _Type(NamedTuple):
    """A type of GGML: weights and bytes of a block, and the bytes before its random codes."""

    kind: gguf.GGMLQuantizationType
    block: int
    nbytes: int
    head: bytes


def _half(value: float) -> bytes:
    return np.float16(value).tobytes()


def _types() -> dict[str, _Type]:
    """By codec. Uniform codes deviate by (levels² − 1) / 12, rooted, from their mean."""
    kinds, four = gguf.GGMLQuantizationType, math.sqrt((16**2 - 1) / 12)
    # Scales and minima of K-quants are six bits each, packed; all are 32 here.
    step, sixes = DEVIATION / four / 32, bytes([160] * 8 + [0] * 4)
    chosen = {
        "q8_0": (kinds.Q8_0, _half(DEVIATION / math.sqrt((256**2 - 1) / 12))),
        "q4_0": (kinds.Q4_0, _half(DEVIATION / four)),
        "q4_k": (kinds.Q4_K, _half(step) + _half(7.5 * step) + sixes),
        "mxfp4": (kinds.MXFP4, bytes([120])),
    }
    return {
        codec: _Type(kind, *gguf.GGML_QUANT_SIZES[kind], head)
        for codec, (kind, head) in chosen.items()
    }


CODECS = ("bf16", "q8_0", "q4_0", "q4_k", "mxfp4")


class _Codes:
    """Matrices of random codes of one type."""

    def __init__(self, kind: _Type, largest: int, seed: int) -> None:
        """`largest`: weights of the largest matrix."""
        self._kind = kind
        blocks = -(-largest // kind.block) + 64 * _STRIDE
        random = np.random.Generator(np.random.SFC64((seed, 2)))
        self._blocks = random.integers(0, 256, (blocks, kind.nbytes), dtype=np.uint8)
        self._blocks[:, : len(kind.head)] = np.frombuffer(kind.head, dtype=np.uint8)
        self._count = 0

    def make(self, shape: tuple[int, ...]) -> _Bytes:
        """uint8 [rows, bytes of a row]."""
        first = _STRIDE * (self._count % 64)
        self._count += 1
        blocks = self._blocks[first : first + math.prod(shape) // self._kind.block]
        return blocks.reshape(*shape[:-1], -1)


class _Tensor(NamedTuple):
    """A tensor of the file: its parts in the checkpoint (several: stacked), and its shape."""

    name: str
    parts: tuple[Weight, ...]
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.parts[0].kind


def _tensors(shape: Shape) -> Iterator[_Tensor]:
    """In file order."""
    stacks: dict[str, list[Weight]] = {}
    for weight in weights(shape):
        layer, _, rest = weight.name.removeprefix("model.layers.").partition(".")
        if weight.name in _RESIDENT:
            yield _Tensor(_RESIDENT[weight.name], (weight,), weight.shape)
        elif rest in _IN_LAYER:
            yield _Tensor(f"blk.{layer}.{_IN_LAYER[rest]}", (weight,), weight.shape)
        else:
            name = f"blk.{layer}.{_EXPERTS[rest.split('.')[-2]]}.weight"
            stack = stacks.setdefault(name, [])
            stack.append(weight)
            if len(stack) == shape.experts:
                yield _Tensor(name, tuple(stacks.pop(name)), (shape.experts, *weight.shape))


def check_codec(codec: str, shape: Shape) -> None:
    """Raises UsageError: no such type here, or a matrix that it cannot hold."""
    if codec not in CODECS:
        raise UsageError(f"--codec {codec}: as GGUF there are {', '.join(CODECS)}")
    if codec == "bf16":
        return
    block, inputs = _types()[codec].block, {t.shape[-1] for t in _tensors(shape) if _noise(t)}
    odd = [count for count in sorted(inputs) if count % block]
    if odd:
        raise UsageError(f"--codec {codec}: {odd[0]} inputs are no multiple of its {block}")


def _noise(tensor: _Tensor) -> bool:
    return tensor.kind == "noise"


def gguf_nbytes(shape: Shape, codec: str) -> int:
    """What the file's tensors take."""
    kind = None if codec == "bf16" else _types()[codec]
    return sum(_nbytes(tensor, kind) for tensor in _tensors(shape))


def _nbytes(tensor: _Tensor, kind: _Type | None) -> int:
    count = math.prod(tensor.shape)
    if tensor.kind in ("ones", "router"):
        return 4 * count
    if kind is None or tensor.kind == "embedding":
        return 2 * count
    return count // kind.block * kind.nbytes


def write_gguf(path: Path, shape: Shape, codec: str, seed: int = 0) -> None:
    """Write it.

    Raises:
        UsageError: see `check_codec`.
    """
    check_codec(codec, shape)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    _describe(writer, shape)
    kind = None if codec == "bf16" else _types()[codec]
    tensors = list(_tensors(shape))
    for tensor in tensors:
        _announce(writer, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    maker = WeightMaker(shape, seed)
    largest = max(math.prod(tensor.shape) for tensor in tensors if _noise(tensor))
    codes = None if kind is None else _Codes(kind, largest, seed)
    for tensor in tensors:
        writer.write_tensor_data(_data(tensor, maker, codes))
    writer.close()


def _announce(writer: gguf.GGUFWriter, tensor: _Tensor, kind: _Type | None) -> None:
    nbytes = _nbytes(tensor, kind)
    if tensor.kind in ("ones", "router"):
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes)
        return
    if kind is None or tensor.kind == "embedding":
        shape, raw = (*tensor.shape[:-1], 2 * tensor.shape[-1]), gguf.GGMLQuantizationType.BF16
    else:
        shape = (*tensor.shape[:-1], tensor.shape[-1] // kind.block * kind.nbytes)
        raw = kind.kind
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), nbytes, raw)


def _data(tensor: _Tensor, maker: WeightMaker, codes: _Codes | None) -> NDArray[Any]:
    if _noise(tensor) and codes is not None:
        return codes.make(tensor.shape)
    parts = torch.stack([maker.make(part) for part in tensor.parts])
    if tensor.kind in ("ones", "router"):
        return parts.float().numpy()
    return parts.view(torch.uint8).numpy()


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Every number that llama.cpp and our own converter want; no tokenizer."""
    config = config_of(shape)
    rope: Any = config.rope_parameters or {}
    writer.add_name("synthetic")
    writer.add_block_count(shape.layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_expert_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
