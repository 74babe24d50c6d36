"""Parts of a configuration that one architecture alone has, from a GGUF file's metadata."""

import logging
from typing import Any

from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.gguf_arch_fields import Fields
from tierrun.tools.sources.gguf_arch_parts import (
    SIGMOID,
    SOFTMAX,
    expert_size,
    fraction,
    gating,
    num_layers,
    rotary,
    routed,
)

log = logging.getLogger(__name__)

_GEMMA_ROTATED = 0.25
"""The part of their heads that published Gemma 4 models rotate in layers of full attention."""

_UNGROUPED = 64
"""DeepSeek's models with more experts choose groups first, which older files do not say."""

_EMBEDDING, _PER_LAYER = "token_embd.weight", "per_layer_token_embd.weight"


def clipped(f: Fields) -> dict[str, Any]:
    """OLMoE's bound on queries, keys and values."""
    key = "attention.clamp_kqv"
    return {"clip_qkv": f.positive(key) if f.has(key) else None}


def gpt_oss(f: Fields) -> dict[str, Any]:
    """Windows in every other layer, from the first on; YaRN without rounded corrections."""
    layers, key = num_layers(f), "attention.sliding_window_pattern"
    sliding = [layer % 2 == 0 for layer in range(layers)]
    if f.has(key):
        sliding = f.flags(key, layers)
    parameters = rotary(f)
    if parameters["rope_type"] == "yarn":
        parameters["truncate"] = False
    return {
        "layer_types": _attention(sliding),
        "sliding_window": f.count("attention.sliding_window"),
        "rope_parameters": parameters,
    }


def _attention(sliding: list[bool]) -> list[str]:
    return ["sliding_attention" if one else "full_attention" for one in sliding]


def deepseek(f: Fields) -> dict[str, Any]:
    """Latent attention; V3 is what scores with a sigmoid."""
    score = gating(f)
    if score not in (SOFTMAX, SIGMOID):
        raise f.wrong("expert_gating_func", "wanted softmax (1) or sigmoid (2); use --config")
    if not f.has("expert_group_count") and f.count("expert_count") > _UNGROUPED:
        log.warning(
            "this file does not say in which groups its experts are chosen: none are assumed, as "
            "llama.cpp does; --config with the original's configuration says it"
        )
    config = _latent(f) | {"rope_parameters": _with_mscale(f, rotary(f))}
    if score == SIGMOID:
        names = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
        return config | names | {"rope_interleave": True}
    limited = f.has("expert_group_count") and f.count("expert_group_count", low=0) > 1
    return config | {"topk_method": "group_limited_greedy" if limited else "greedy"}


def _latent(f: Fields) -> dict[str, Any]:
    """Sizes of latent attention: `_mla` keys where kv_b is split, else those of whole heads."""
    rotated = f.count("rope.dimension_count", high=1 << 16)
    split = f.has("attention.key_length_mla")
    key, value = (f"attention.{name}_length{'_mla' * split}" for name in ("key", "value"))
    query = "blk.0.attn_q_a.weight"
    return {
        "num_key_value_heads": f.count("attention.head_count"),
        "q_lora_rank": f.shape(query, 2)[0] if query in f.shapes else None,
        "kv_lora_rank": f.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": f.count(key, low=rotated + 1, high=1 << 16) - rotated,
        "v_head_dim": f.count(value, high=1 << 16),
    }


def _with_mscale(f: Fields, parameters: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp keeps a tenth of mscale_all_dim, and takes mscale for the same, as it always is."""
    key = "rope.scaling.yarn_log_multiplier"
    if parameters["rope_type"] != "yarn" or not f.has(key):
        return parameters
    scale = round(f.positive(key) * 10, 6)
    return parameters | {"mscale": scale, "mscale_all_dim": scale}


def gemma(f: Fields) -> dict[str, Any]:
    """Gemma 4: two kinds of attention with heads and rotations of their own, a dense and a sparse
    feed-forward side by side, perhaps embeddings per layer."""
    sliding = f.flags("attention.sliding_window_pattern", num_layers(f))
    per_layer = f.count("embedding_length_per_layer_input", 0, low=0)
    experts, used = routed(f)
    cap = "final_logit_softcapping"
    return {
        "layer_types": _attention(sliding),
        "sliding_window": f.count("attention.sliding_window"),
        "num_experts": experts,
        "top_k_experts": used,
        "moe_intermediate_size": expert_size(f),
        "hidden_size_per_layer_input": per_layer,
        "vocab_size_per_layer_input": f.shape(_PER_LAYER if per_layer else _EMBEDDING, 2)[0],
        "final_logit_softcapping": f.positive(cap) if f.has(cap) else None,
        "rope_parameters": _gemma_rotary(f),
        **_gemma_feed_forward(f),
        **_gemma_heads(f, sliding),
    }


def _gemma_heads(f: Fields, sliding: list[bool]) -> dict[str, Any]:
    """Heads of the layers with a window, and `global` ones of the others."""
    counts = f.counts("attention.head_count_kv", len(sliding))
    windowed = {count for count, one in zip(counts, sliding, strict=True) if one}
    whole = {count for count, one in zip(counts, sliding, strict=True) if not one}
    if len(windowed) > 1 or len(whole) > 1:
        raise f.wrong("attention.head_count_kv", "more than two kinds of layers; use --config")
    common = (windowed or whole).pop()
    shared = _keys_are_values(f, sliding)
    other = whole.pop() if whole else common
    if other != common and not shared:
        raise f.wrong(
            "attention.head_count_kv", "differs although values have weights of their own"
        )
    return {
        "head_dim": f.count("attention.key_length_swa", high=1 << 16),
        "global_head_dim": f.count("attention.key_length", high=1 << 16),
        "num_key_value_heads": common,
        "num_global_key_value_heads": other if shared else None,
        "attention_k_eq_v": shared,
    }


def _keys_are_values(f: Fields, sliding: list[bool]) -> bool:
    """Whether layers of full attention have no weights for values."""
    whole = [layer for layer, one in enumerate(sliding) if not one]
    return any(
        f"blk.{layer}.attn_k.weight" in f.shapes and f"blk.{layer}.attn_v.weight" not in f.shapes
        for layer in whole
    )


def _gemma_feed_forward(f: Fields) -> dict[str, Any]:
    """The dense part; twice as wide, perhaps, in layers that share the keys of others."""
    layers = num_layers(f)
    sizes = f.counts("feed_forward_length", layers)
    shared = f.count("attention.shared_kv_layers", 0, low=0, high=layers - 1)
    first, last = sizes[0], sizes[-1]
    double = shared > 0 and last == 2 * first
    if sizes != [first] * (layers - shared) + [last] * shared or not (double or last == first):
        raise f.wrong("feed_forward_length", "not a pattern that Gemma 4 has; use --config")
    return {
        "intermediate_size": first,
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": double,
    }


def _gemma_rotary(f: Fields) -> dict[str, Any]:
    """Layers with a window rotate whole heads, the others a part that `rope_freqs` shows."""
    width = f.count("attention.key_length_swa", high=1 << 16)
    rotated = f.count("rope.dimension_count_swa", width, high=width)
    sliding: dict[str, Any] = {"rope_type": "default"}
    sliding["rope_theta"] = f.positive("rope.freq_base_swa", 10000.0)
    if rotated != width:
        sliding["partial_rotary_factor"] = fraction(rotated, width)
    full = {
        "rope_type": "proportional",
        "rope_theta": f.positive("rope.freq_base", 1000000.0),
        "partial_rotary_factor": _rotated(f),
    }
    return {"sliding_attention": sliding, "full_attention": full}


def _rotated(f: Fields) -> float:
    """The part of each head that turns: where the frequencies are divided by no huge number."""
    if f.rope_freqs is None:
        return _GEMMA_ROTATED
    if not f.rope_freqs:
        raise CheckpointError("tensor rope_freqs.weight is empty; download the file again")
    turning = sum(1 for divisor in f.rope_freqs if divisor < 1e20)
    return fraction(turning, len(f.rope_freqs))
