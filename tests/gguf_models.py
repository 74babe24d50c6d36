"""The models whose GGUF files are fixtures: llama.cpp's architectures, with numbers of our own.

Every number in a configuration that changes the outcome differs from transformers' default, as
far as the converter writes it down.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Fixture:
    """A model family as a GGUF: the pre-tokenizer's name, numbers for its config, and options.

    `mtp` adds a multi-token-prediction layer to the checkpoint, under this prefix.
    """

    family: str
    pre: str
    config: dict[str, Any]
    options: tuple[str, ...] = ()
    mtp: str | None = None


def experts(count: int) -> dict[str, Any]:
    """As many experts, under every name that a configuration may have for it."""
    return dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), count)


SMALL: dict[str, Any] = experts(5) | {
    "num_experts_per_tok": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 640,
}

_ROPE: dict[str, Any] = {"rope_theta": 4321.0, "rope_type": "default"}

_PARTIAL: dict[str, Any] = _ROPE | {"partial_rotary_factor": 0.5}

_LINEAR: dict[str, Any] = experts(4) | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 3,
    "shared_expert_intermediate_size": 40,
    "head_dim": 24,
    "rope_parameters": _PARTIAL,
    "rms_norm_eps": 2e-5,
}

_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 4321.0,
    "factor": 4.0,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
    "original_max_position_embeddings": 64,
}

_LATENT: dict[str, Any] = experts(6) | {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.75,
    "rms_norm_eps": 2e-5,
}

MODELS: dict[str, Fixture] = {
    "mixtral": Fixture(
        "mixtral", "llama-bpe", {"rope_parameters": _ROPE, "rms_norm_eps": 2e-5, "head_dim": 24}
    ),
    "olmoe": Fixture(  # the converter writes an epsilon of its own
        "olmoe", "olmo", {"rope_parameters": _ROPE}, ("--split-max-tensors", "14")
    ),
    "qwen2moe": Fixture(
        "qwen2_moe",
        "qwen2",
        {
            "rope_parameters": _ROPE,
            "rms_norm_eps": 2e-5,
            "shared_expert_intermediate_size": 64,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3moe": Fixture(
        "qwen3_moe",
        "qwen2",
        {
            "rope_parameters": {
                key: value for key, value in _YARN.items() if not key.startswith("beta")
            },
            "rms_norm_eps": 2e-5,
            "head_dim": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3next": Fixture("qwen3_next", "qwen2", _LINEAR, ("--no-mtp", "--fuse-gate-up-exps")),
    "qwen35moe": Fixture(
        "qwen3_5_moe_text",
        "qwen35",
        _LINEAR | experts(3) | {"num_experts_per_tok": 2},
        mtp="mtp.layers.0.",
    ),
    "deepseek_v2": Fixture(
        "deepseek_v2",
        "deepseek-llm",
        _LATENT
        | {
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": Fixture(
        "deepseek_v3",
        "deepseek-v3",
        _LATENT | {"rope_parameters": _ROPE, "scoring_func": "sigmoid"},
    ),
    "glm4moe": Fixture(
        "glm4_moe",
        "glm4",
        experts(4)
        | {
            "rope_parameters": _ROPE | {"partial_rotary_factor": 0.25},
            "rms_norm_eps": 2e-5,
            "head_dim": 24,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.75,
        },
        mtp="model.layers.2.",
    ),
    "gpt-oss": Fixture(
        "gpt_oss",
        "gpt-4o",
        {
            "sliding_window": 8,
            "head_dim": 24,
            "rope_parameters": _YARN | {"truncate": False},
            "rms_norm_eps": 2e-5,
        },
    ),
    "minimax-m2": Fixture(
        "minimax_m2",
        "minimax-m2",
        {
            "rope_parameters": _PARTIAL,
            "head_dim": 24,
            "rotary_dim": 12,
            "scoring_func": "sigmoid",
            "rms_norm_eps": 2e-5,
        },
    ),
    "gemma4": Fixture(
        "gemma4_text",
        "gemma4",
        {
            "top_k_experts": 3,
            "rms_norm_eps": 2e-5,
            "sliding_window": 8,
            "final_logit_softcapping": 20.0,
            "attention_k_eq_v": True,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 4321.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 54321.0,
                },
            },
            "tie_word_embeddings": True,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
    ),
}
"""Name (of the architecture in llama.cpp, unless two share one) → how it is made."""

_TINY: dict[str, Any] = experts(4) | {
    "hidden_size": 32,
    "num_experts_per_tok": 2,
    "rope_parameters": _ROPE,
}

OTHERS: dict[str, Fixture] = {
    "afmoe": Fixture("afmoe", "qwen2", _TINY),
    "dots1": Fixture("dots1", "qwen2", _TINY),
    "exaone-moe": Fixture("exaone_moe", "qwen2", _TINY),
    "granitemoe": Fixture("granitemoe", "qwen2", _TINY | {"attention_multiplier": 0.2}),
    "lfm2moe": Fixture("lfm2_moe", "qwen2", _TINY),
}
"""Those whose configuration must be given."""
