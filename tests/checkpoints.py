"""Tiny random checkpoints of real architectures, as `save_pretrained` writes them.

Every parameter is random, biases, norms, sinks and correction terms included, so that a weight
that is lost, swapped or left at its initial value changes the outcome.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Small numbers for the names that architectures use; a family takes those it knows."""

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": None},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "qwen3_5_moe_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "glm4_moe": {},
    "gpt_oss": {},
    "minimax_m2": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 16,
        "global_head_dim": 32,
    },
    "afmoe": {},
    "aria_text": {},
    "axk1": {},
    "axk2": {},
    "bailing_hybrid": {},
    "beam": {"num_hidden_layers": 4},
    "cohere2_moe": {},
    "deepseek_v32": {},
    "deepseek_v4": {},
    "dots1": {},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["indexed_attention", "sliding_attention"],
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"num_hidden_layers": 3, "mlp_only_layers": [0]},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["hybrid_sliding", "hybrid"],
    },
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "unpadded_vocab_size": 256,
        "layer_types": ["hybrid_sliding", "hybrid"],
    },
    "jamba": {},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m3_vl_text": {},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "phimoe": {},
    "qwen4_exp_text": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 128,
        "split_ngram_parts": 4,
    },
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"]},
}
"""Model type → what it needs beyond `_COMMON`."""


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of `family` with tens of thousands of parameters."""
    default = AutoConfig.for_model(family)
    known = {name: value for name, value in _COMMON.items() if _knows(default, name)}
    return AutoConfig.for_model(family, **known | FAMILIES.get(family, {}) | overrides)


def _knows(config: PreTrainedConfig, name: str) -> bool:
    return name in config.to_dict() or name in config.attribute_map


def tiny_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A causal language model of `family` with random weights everywhere."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype)
    _perturb(model, seed)
    return model.eval()


@torch.no_grad()
def _perturb(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in _weights(model).items():
        # transformers sets the last balancing bias whatever the checkpoint says
        if tensor.is_floating_point() and not name.endswith("balancing_biases"):
            noise = torch.randn(tensor.shape, generator=generator) * 0.05
            tensor.add_(noise.to(tensor.dtype))


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, tied ones once."""
    unique = {tensor.data_ptr(): (name, tensor) for name, tensor in model.state_dict().items()}
    return dict(unique.values())


def tiny_checkpoint(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    fused: bool = False,
    max_shard_size: str = "50GB",
    **overrides: Any,
) -> Path:
    """A checkpoint of `tiny_model` in `directory`.

    `fused` writes the parameters under the model's own names and shapes (experts as 3-D tensors),
    else `save_pretrained` writes what published checkpoints hold. `max_shard_size` makes several
    files with an index.
    """
    model = tiny_model(family, dtype=dtype, seed=seed, **overrides)
    with quiet():
        model.save_pretrained(
            directory, max_shard_size=max_shard_size, save_original_format=not fused
        )
    return directory


_TINY_TOWER: dict[str, Any] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "out_hidden_size": 64,
    "patch_size": 4,
    "image_size": 16,
    "text_hidden_size": 64,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "default_output_length": 4,
}


def tiny_composite(family: str, text_family: str, directory: Path) -> PreTrainedModel:
    """A checkpoint in `directory` of a model that sees, around a tiny `text_family`; the model."""
    default = AutoConfig.for_model(family)
    parts: dict[str, Any] = {"text_config": tiny_config(text_family).to_dict()}
    vision = default.vision_config.to_dict()
    parts["vision_config"] = vision | {k: v for k, v in _TINY_TOWER.items() if k in vision}
    config = AutoConfig.for_model(family, **parts)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _perturb(model, seed=0)
    with quiet():
        model.save_pretrained(directory)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and advice."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def reference(directory: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The checkpoint as transformers loads it."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
