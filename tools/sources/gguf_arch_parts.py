"""Parts of a configuration that several architectures share, from a GGUF file's metadata.

Each is a function of `Fields` that gives entries of config.json. Where the metadata is silent, what
llama.cpp's loader (src/models/*.cpp) assumes is assumed; shapes decide over metadata.
"""

import math
from collections.abc import Callable
from typing import Any

from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.gguf_arch_fields import Fields, blocks

Part = Callable[[Fields], dict[str, Any]]

SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers for how router logits become scores."""


def base(f: Fields) -> dict[str, Any]:
    """Sizes, epsilon and token ids, which every architecture has."""
    vocabulary, hidden = f.shape("token_embd.weight", 2)
    if f.count("embedding_length") != hidden:
        raise f.wrong("embedding_length", f"token_embd.weight has {hidden} columns")
    heads = f.count("attention.head_count", high=1 << 16)
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": num_layers(f),
        "num_attention_heads": heads,
        "max_position_embeddings": f.count("context_length", high=1 << 31),
        "rms_norm_eps": f.positive("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in f.shapes,
        **_special_tokens(f, vocabulary),
    }


def num_layers(f: Fields) -> int:
    """The layers that make tokens: those of multi-token prediction, at the end, are not counted."""
    present = blocks(f.shapes)
    count = f.count("block_count", high=1 << 16)
    layers = count - f.count("nextn_predict_layers", 0, low=0, high=count - 1)
    missing = set(range(layers)) - present
    if missing:
        raise f.wrong("block_count", f"block {min(missing)} has no tensors; is a part missing?")
    return layers


def _special_tokens(f: Fields, vocabulary: int) -> dict[str, Any]:
    """Beginning, padding, and all tokens that end an answer (of the text, turn or message)."""
    ids: dict[str, Any] = {}
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        ids[name] = _token(f, key, vocabulary)
    ends = [_token(f, key, vocabulary) for key in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(end for end in ends if end is not None))
    ids["eos_token_id"] = known[0] if len(known) == 1 else known or None
    return ids


def _token(f: Fields, name: str, vocabulary: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return f.count(key, low=0, high=vocabulary - 1) if f.has(key) else None


def kv_heads(f: Fields) -> dict[str, Any]:
    """As many key as query heads unless said otherwise; the same number in every layer."""
    if not f.has("attention.head_count_kv"):
        return {"num_key_value_heads": f.count("attention.head_count")}
    counts = f.counts("attention.head_count_kv", num_layers(f))
    if len(set(counts)) > 1:
        raise f.wrong("attention.head_count_kv", "it differs between layers; use --config")
    return {"num_key_value_heads": counts[0]}


def head_dim(f: Fields) -> int:
    even = f.count("embedding_length") // f.count("attention.head_count")
    return f.count("attention.key_length", max(even, 1), high=1 << 16)


def own_head_dim(f: Fields) -> dict[str, Any]:
    return {"head_dim": head_dim(f)}


def experts(name: str, size: str) -> Part:
    """How many there are (as `name`), how many a token uses, and their inner size (as `size`)."""

    def part(f: Fields) -> dict[str, Any]:
        count, used = routed(f)
        return {name: count, "num_experts_per_tok": used, size: expert_size(f)}

    return part


def routed(f: Fields) -> tuple[int, int]:
    """How many experts there are, and how many of them a token uses."""
    count = f.count("expert_count", high=1 << 16)
    router = f"blk.{sparse_layers(f)[0]}.ffn_gate_inp.weight"
    if f.shape(router, 2)[0] != count:
        raise f.wrong("expert_count", f"{router} has {f.shape(router, 2)[0]} rows")
    return count, f.count("expert_used_count", high=count)


def expert_size(f: Fields) -> int:
    """The inner size of an expert: columns of its down matrix."""
    stem = f"blk.{sparse_layers(f)[0]}.ffn_down"
    for tensor, dimensions in ((f"{stem}_exps.weight", 3), (f"{stem}.0.weight", 2)):
        if tensor in f.shapes:
            return f.shape(tensor, dimensions)[-1]
    raise CheckpointError(f"tensor {stem}_exps.weight is missing; is a part of the file?")


def sparse_layers(f: Fields) -> list[int]:
    """The layers with a router.

    Raises:
        CheckpointError: none has one.
    """
    layers = range(num_layers(f))
    found = [layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" in f.shapes]
    if not found:
        raise CheckpointError(
            "no layer has a router (ffn_gate_inp.weight): no routed experts to stream"
        )
    return found


def dense_layers(f: Fields) -> dict[str, Any]:
    """Qwen's way to say which layers have no experts, and their inner size."""
    dense = sorted(set(range(num_layers(f))) - set(sparse_layers(f)))
    sizes = {"intermediate_size": f.count("feed_forward_length", expert_size(f))}
    return sizes | {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def leading_dense(f: Fields) -> dict[str, Any]:
    """DeepSeek's and GLM's: the first layers are dense, the others have shared experts."""
    sparse = sparse_layers(f)
    if sparse != list(range(sparse[0], num_layers(f))):
        raise CheckpointError(
            f"layers {sparse} have routers (ffn_gate_inp.weight), wanted all from one on; "
            "is a part of the file?"
        )
    return {
        "first_k_dense_replace": sparse[0],
        "intermediate_size": f.count("feed_forward_length", expert_size(f)),
        "n_shared_experts": f.count("expert_shared_count", low=0, high=1 << 16),
        **_groups(f),
        "routed_scaling_factor": f.positive("expert_weights_scale", 1.0),
        "norm_topk_prob": f.flag("expert_weights_norm", False),
    }


def _groups(f: Fields) -> dict[str, Any]:
    """Groups of experts that are chosen before experts are; older files have none."""
    experts = f.count("expert_count", high=1 << 16)
    groups = f.count("expert_group_count", 0, low=0, high=experts) or 1
    if experts % groups:
        raise f.wrong("expert_group_count", f"not a divisor of {experts} experts")
    used = f.count("expert_group_used_count", 0, low=0, high=groups) or groups
    return {"n_group": groups, "topk_group": used}


def shared_expert(f: Fields) -> dict[str, Any]:
    """Qwen's shared expert."""
    rows, _ = f.shape(f"blk.{sparse_layers(f)[0]}.ffn_gate_shexp.weight", 2)
    return {"shared_expert_intermediate_size": rows}


def gating(f: Fields) -> int:
    """SOFTMAX or SIGMOID; only the latter has a correction bias, where the metadata is silent."""
    corrected = f"blk.{sparse_layers(f)[-1]}.exp_probs_b.bias" in f.shapes
    found = f.count("expert_gating_func", 0, low=0)
    return found or (SIGMOID if corrected else SOFTMAX)


def only_sigmoid(f: Fields) -> dict[str, Any]:
    """Nothing to say, for architectures that score no other way."""
    if f.count("expert_gating_func", SIGMOID) != SIGMOID:
        raise f.wrong("expert_gating_func", "this architecture scores with a sigmoid (2) only")
    return {}


def unscaled(f: Fields) -> dict[str, Any]:
    """Nothing to say, for architectures whose router weights are not scaled."""
    if f.number("expert_weights_scale", 1.0) not in (0.0, 1.0):
        raise f.wrong("expert_weights_scale", "this architecture scales no weights; use --config")
    return {}


def normed(f: Fields) -> dict[str, Any]:
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in f.shapes}


def biased(f: Fields) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in f.shapes}


def rope(f: Fields) -> dict[str, Any]:
    """Rotary parameters of an architecture that rotates whole heads."""
    if f.count("rope.dimension_count", head_dim(f)) != head_dim(f):
        raise f.wrong("rope.dimension_count", f"this architecture rotates all {head_dim(f)}")
    return {"rope_parameters": rotary(f)}


def partial_rope(f: Fields) -> dict[str, Any]:
    """Rotary parameters of an architecture that rotates a part of each head."""
    whole = head_dim(f)
    rotated = f.count("rope.dimension_count", whole, high=whole)
    return {"rope_parameters": rotary(f) | {"partial_rotary_factor": fraction(rotated, whole)}}


def fraction(part: int, whole: int) -> float:
    """`part / whole`, such that transformers' `int(whole * fraction)` is `part` again."""
    exact = part / whole
    return exact if int(whole * exact) == part else math.nextafter(exact, math.inf)


def rotary(f: Fields) -> dict[str, Any]:
    """The base and the scaling: none, linear, or YaRN."""
    if "rope_freqs.weight" in f.shapes:
        raise CheckpointError(
            "tensor rope_freqs.weight scales this file's rotary frequencies, in a way that its "
            "metadata does not say; give the configuration with --config HF_DIR_OR_ID"
        )
    parameters: dict[str, Any] = {"rope_theta": f.positive("rope.freq_base", 10000.0)}
    kind = f.text("rope.scaling.type", "none")
    if kind == "none":
        return parameters | {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise f.wrong("rope.scaling.type", "not supported from metadata; use --config HF_DIR_OR_ID")
    parameters |= {"rope_type": kind, "factor": f.positive("rope.scaling.factor")}
    return parameters | (_yarn(f) if kind == "yarn" else {})


_YARN = {
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "attention_factor": "yarn_attn_factor",
}


def _yarn(f: Fields) -> dict[str, Any]:
    length = f.count("rope.scaling.original_context_length", high=1 << 31)
    given = {
        name: f.positive(f"rope.scaling.{key}")
        for name, key in _YARN.items()
        if f.has(f"rope.scaling.{key}")
    }
    return {"original_max_position_embeddings": length} | given


def recurrent(f: Fields) -> dict[str, Any]:
    """Qwen's gated delta net, and which layers have it."""
    values = f.count("ssm.time_step_rank", high=1 << 16)
    keys = f.count("ssm.group_count", high=values)
    inner = f.count("ssm.inner_size")
    if values % keys or inner % values:
        raise f.wrong("ssm.time_step_rank", f"not a multiple of {keys}, or no divisor of {inner}")
    return {
        "linear_conv_kernel_dim": f.count("ssm.conv_kernel", high=1 << 10),
        "linear_key_head_dim": f.count("ssm.state_size", high=1 << 16),
        "linear_value_head_dim": inner // values,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "layer_types": ["linear_attention" if one else "full_attention" for one in _recurrent(f)],
    }


def _recurrent(f: Fields) -> list[bool]:
    if f.has("attention.recurrent_layers"):
        return f.flags("attention.recurrent_layers", num_layers(f))
    interval = f.count("full_attention_interval", 4)
    return [(layer + 1) % interval != 0 for layer in range(num_layers(f))]
