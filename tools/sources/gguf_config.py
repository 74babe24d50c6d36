"""The configuration of a model from its GGUF file's metadata: the config.json that it was made of.

One entry per architecture of llama.cpp below; what they are composed of is in `gguf_arch_parts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.gguf_arch_families import (
    clipped,
    deepseek,
    gemma,
    gpt_oss,
)
from tierrun.tools.sources.gguf_arch_fields import Fields, Shapes
from tierrun.tools.sources.gguf_arch_parts import (
    Part,
    base,
    biased,
    dense_layers,
    experts,
    kv_heads,
    leading_dense,
    normed,
    only_sigmoid,
    own_head_dim,
    partial_rope,
    recurrent,
    rope,
    shared_expert,
    unscaled,
)


def hf_config(
    metadata: Mapping[str, Any], shapes: Shapes, rope_freqs: Sequence[float] | None = None
) -> dict[str, Any]:
    """A complete config.json from GGUF `metadata` and tensor `shapes` (as torch has them).

    `rope_freqs` are the values of the tensor of that name, which alone say which part of its
    heads Gemma rotates; without them, the published models' quarter is assumed.

    Raises:
        CheckpointError: a dense model, an architecture that is not known here, or a key that is
            missing, mistyped or out of bounds; it is named.
    """
    architecture = Fields(metadata, shapes, "general").text("general.architecture")
    f = Fields(metadata, shapes, architecture, rope_freqs)
    if f.count("expert_count", 0, low=0) == 0:
        raise CheckpointError(
            f"{architecture} is a dense model: it has no routed experts to stream"
        )
    known = ARCHITECTURES.get(architecture)
    if known is None:
        raise CheckpointError(
            f"the configuration of a {architecture} model cannot be told from its GGUF file; give "
            "it with --config HF_DIR_OR_ID"
        )
    config = {"model_type": known.model_type, "architectures": [known.model_class]}
    for part in (base, *known.parts):
        config |= part(f)
    return config | known.constants


@dataclass(frozen=True, slots=True)
class Architecture:
    """transformers' names for an architecture, what metadata says, and what is always so in it."""

    model_type: str
    model_class: str
    parts: tuple[Part, ...]
    constants: dict[str, Any] = field(default_factory=dict)


_QWEN = (kv_heads, experts("num_experts", "moe_intermediate_size"), unscaled)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "mixtral",
        "MixtralForCausalLM",
        (kv_heads, own_head_dim, rope, experts("num_local_experts", "intermediate_size"), unscaled),
        {"hidden_act": "silu", "sliding_window": None},
    ),
    "olmoe": Architecture(
        "olmoe",
        "OlmoeForCausalLM",
        (kv_heads, rope, clipped, experts("num_experts", "intermediate_size"), unscaled),
        {"hidden_act": "silu", "norm_topk_prob": False, "attention_bias": False},
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        (*_QWEN, rope, dense_layers, shared_expert),
        {
            "hidden_act": "silu",
            "norm_topk_prob": False,
            "qkv_bias": True,
            "use_sliding_window": False,
        },
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (*_QWEN, own_head_dim, rope, dense_layers, biased),
        {"hidden_act": "silu", "norm_topk_prob": True, "use_sliding_window": False},
    ),
    "qwen3next": Architecture(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        (*_QWEN, own_head_dim, partial_rope, dense_layers, shared_expert, recurrent, biased),
        {"hidden_act": "silu", "norm_topk_prob": True},
    ),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        (*_QWEN, own_head_dim, partial_rope, shared_expert, recurrent, biased),
        {"hidden_act": "silu"},
    ),
    "deepseek2": Architecture(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        (leading_dense, experts("n_routed_experts", "moe_intermediate_size"), deepseek),
        {"hidden_act": "silu", "attention_bias": False},
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        (
            kv_heads,
            own_head_dim,
            partial_rope,
            leading_dense,
            experts("n_routed_experts", "moe_intermediate_size"),
            only_sigmoid,
            biased,
            normed,
        ),
        {"hidden_act": "silu", "num_nextn_predict_layers": 0},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        (kv_heads, own_head_dim, gpt_oss, experts("num_local_experts", "intermediate_size")),
        {"hidden_act": "silu", "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        (
            kv_heads,
            own_head_dim,
            partial_rope,
            experts("num_local_experts", "intermediate_size"),
            only_sigmoid,
            unscaled,
        ),
        {"hidden_act": "silu"},
    ),
    "gemma4": Architecture(
        "gemma4_text",
        "Gemma4ForCausalLM",
        (gemma,),
        {"hidden_activation": "gelu_pytorch_tanh", "enable_moe_block": True},
    ),
}
"""By `general.architecture`."""
