"""A checkpoint of any size that takes no room: all its weights are a hole in the file."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from transformers import MixtralConfig

from tierrun.engine.architecture import build_meta
from tierrun.io.header import build_header

_HIDDEN, _INNER, _EXPERTS = 1024, 4096, 8


def hollow_checkpoint(directory: Path, *, fused: bool, num_layers: int = 7) -> Path:
    """A bf16 Mixtral of zeros, 200 MB a layer; `fused` keeps a layer's experts in one tensor."""
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=_HIDDEN,
        intermediate_size=_INNER,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=_EXPERTS,
    )
    config.save_pretrained(directory)
    shapes = {name: tuple(tensor.shape) for name, tensor in build_meta(config).state_dict().items()}
    if not fused:
        shapes = dict(_published(shapes))
    entries = {name: ("BF16", shape, 2 * prod(shape)) for name, shape in shapes.items()}
    header, extents = build_header(entries, {"format": "pt"})
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(extent.end for extent in extents.values()))
    return directory


def _published(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a published Mixtral: three matrices for each expert."""
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".mlp.experts.")
        if not path:
            yield name, shape
        for expert in range(_EXPERTS if path else 0):
            prefix = f"{path}.block_sparse_moe.experts.{expert}"
            if leaf == "down_proj":
                yield f"{prefix}.w2.weight", (_HIDDEN, _INNER)
            else:
                yield f"{prefix}.w1.weight", (_INNER, _HIDDEN)
                yield f"{prefix}.w3.weight", (_INNER, _HIDDEN)
