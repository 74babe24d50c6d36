"""What llama.cpp's converters do to values, undone: a rule per architecture and kind of parameter.

Everything not listed here is stored as transformers has it. Functions on matrices only move rows
and columns (any dtype, the meta device included), so that a quantised tensor can follow them;
arithmetic happens on vectors alone. The ideas are those of llama.cpp's conversion/*.py, backwards.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import ConversionOps

Rearrangement = Callable[..., torch.Tensor]
"""The parameter, of its source tensors in order."""


class Rearrange(ConversionOps):
    """A conversion operation of transformers that applies `function` to the sources, in order."""

    def __init__(self, function: Rearrangement) -> None:
        self.function = function

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: object,
    ) -> dict[str, Any]:
        # the first operation is given the sources, another what the one before it made
        found = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        tensors = found or list(input_dict.values())
        flat = [one[0] if isinstance(one, list) else one for one in tensors]
        return {target_patterns[0]: self.function(*flat)}


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameters whose name `pattern` finds are made by `undo(config)` of their `parts`.

    `parts` replace what `pattern` found, which gives the names that llama.cpp's converter maps;
    none: the parameter's own. A rule applies where the file has all of its parts.
    """

    pattern: str
    undo: Callable[[PreTrainedConfig], Rearrangement]
    parts: tuple[str, ...] = ()

    def sources(self, parameter: str) -> list[str] | None:
        """The names to map for `parameter`, or None where the rule is not about it."""
        if re.search(self.pattern, parameter) is None:
            return None
        if not self.parts:
            return [parameter]
        return [re.sub(self.pattern, part, parameter) for part in self.parts]


def rules_of(architecture: str) -> Sequence[Rule]:
    """The rules for a GGUF `architecture`, more particular ones first."""
    return (*_RULES.get(architecture, ()), *_EVERYWHERE)


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[E, out, in] each → [E, 2·out, in], rows in turn as in gpt-oss; biases [E, out] too."""
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def transpose(experts: torch.Tensor) -> torch.Tensor:
    """[E, out, in] → [E, in, out]."""
    return experts.transpose(1, 2)


def _split(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
    """`tensor` with its rows counted by `sizes`, of which one may be -1."""
    return tensor.reshape(*sizes, *tensor.shape[1:])


def _rope_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from llama.cpp's pairs to transformers' halves (`LlamaModel.permute`)."""
    return _split(tensor, heads, -1, 2).transpose(1, 2).flatten(0, 2)


def _join_kv(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[heads, rank, nope] and [heads, v, rank] → [heads·(nope + v), rank], head by head."""
    return torch.cat([k.transpose(1, 2), v], dim=1).flatten(0, 1)


def _join_qkvz(qkv: torch.Tensor, z: torch.Tensor, groups: int, head: int) -> torch.Tensor:
    """All q, all k, all v and all z rows → for each of `groups` its q, k, v and z."""
    keys = groups * head
    parts = [*torch.split(qkv, [keys, keys, qkv.shape[0] - 2 * keys]), z]
    return torch.cat([_split(part, groups, -1) for part in parts], dim=1).flatten(0, 1)


def _group(tensor: torch.Tensor, groups: int, head: int, start: int = 0) -> torch.Tensor:
    """Value heads from `start` on, from tiled (v0k0 v0k1 v1k0 …) to grouped by key head."""
    rows = _split(tensor[start:], -1, groups, head).transpose(0, 1).flatten(0, 2)
    return torch.cat([tensor[:start], rows]) if start else rows


def _group_columns(tensor: torch.Tensor, groups: int, head: int) -> torch.Tensor:
    return tensor.reshape(len(tensor), -1, groups, head).transpose(1, 2).flatten(1, 3)


def _less_one(norm: torch.Tensor) -> torch.Tensor:
    return norm - 1


def _log_negative(decay: torch.Tensor) -> torch.Tensor:
    return torch.log(-decay)


def _row(vector: torch.Tensor) -> torch.Tensor:
    """A vector as the matrix of one row that transformers has."""
    return vector.reshape(1, -1)


def _channels(kernel: torch.Tensor) -> torch.Tensor:
    """[channels, width] → [channels, 1, width]."""
    return kernel.unsqueeze(1)


def _always(function: Rearrangement) -> Callable[[PreTrainedConfig], Rearrangement]:
    return lambda _: function


def _after(first: Rearrangement, then: Rearrangement) -> Rearrangement:
    return lambda *tensors: then(first(*tensors))


def _heads(name: str) -> Callable[[PreTrainedConfig], Rearrangement]:
    return lambda config: partial(_rope_halves, heads=getattr(config, name))


def _qkvz(config: PreTrainedConfig) -> Rearrangement:
    groups, head = config.linear_num_key_heads, config.linear_key_head_dim
    return partial(_join_qkvz, groups=groups, head=head)


def _values(config: PreTrainedConfig) -> Rearrangement:
    groups, head = config.linear_num_key_heads, config.linear_value_head_dim
    return partial(_group, groups=groups, head=head)


def _values_after_keys(config: PreTrainedConfig) -> Rearrangement:
    groups, head = config.linear_num_key_heads, config.linear_value_head_dim
    start = 2 * groups * config.linear_key_head_dim
    return partial(_group, groups=groups, head=head, start=start)


def _value_columns(config: PreTrainedConfig) -> Rearrangement:
    groups, head = config.linear_num_key_heads, config.linear_value_head_dim
    return partial(_group_columns, groups=groups, head=head)


def _value_heads(config: PreTrainedConfig) -> Rearrangement:
    return partial(_group, groups=config.linear_num_key_heads, head=1)


_SHIFTED_NORMS = Rule(r"(?<!linear_attn\.)norm\.weight$", _always(_less_one))

_EVERYWHERE = (Rule(r"shared_expert_gate\.weight$", _always(_row)),)

_LLAMA = (
    Rule(r"\.q_proj\.(weight|bias)$", _heads("num_attention_heads")),
    Rule(r"\.k_proj\.(weight|bias)$", _heads("num_key_value_heads")),
)

_RULES: dict[str, tuple[Rule, ...]] = {
    "llama": _LLAMA,
    "granitemoe": _LLAMA,
    "lfm2moe": (Rule(r"\.conv\.conv\.weight$", _always(_channels)),),
    "deepseek2": (Rule(r"\.kv_b_proj\.", _always(_join_kv), (".k_b_proj.", ".v_b_proj.")),),
    "qwen3next": (
        _SHIFTED_NORMS,
        Rule(r"\.A_log$", _always(_log_negative)),
        Rule(r"\.conv1d\.weight$", _always(_channels)),
        Rule(r"\.in_proj_qkvz\.", _qkvz, (".in_proj_qkv.", ".in_proj_z.")),
    ),
    "qwen35moe": (
        _SHIFTED_NORMS,
        Rule(r"\.A_log$", lambda config: _after(_log_negative, _value_heads(config))),
        Rule(r"\.dt_bias$", _value_heads),
        Rule(r"\.in_proj_[ab]\.weight$", _value_heads),
        Rule(r"\.in_proj_z\.weight$", _values),
        Rule(r"\.in_proj_qkv\.weight$", _values_after_keys),
        Rule(r"\.conv1d\.weight$", lambda config: _after(_values_after_keys(config), _channels)),
        Rule(r"\.out_proj\.weight$", _value_columns),
    ),
}

_AS_STORED = frozenset(
    "afmoe dots1 exaone-moe gemma4 glm4moe gpt-oss minimax-m2 olmoe qwen2moe qwen3moe".split()
)
"""Architectures tested to need no rules of their own."""


def is_tested(architecture: str) -> bool:
    """Whether it is known what the converter did to the values of this architecture."""
    return architecture in _RULES or architecture in _AS_STORED
