"""Which tensors of a checkpoint become which parameters of the model: transformers' own mapping.

The same walk as `transformers.core_model_loading.convert_and_load_state_dict_in_model`, over names
only, so that whatever transformers can load record by record, tierrun converts without knowing
the architecture.
"""

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True, slots=True)
class Assembly:
    """How `target` is made: `converter` on `sources` (its source pattern → tensor names, ordered).

    Without a converter the one source tensor is the parameter.
    """

    target: str
    converter: WeightConverter | None
    sources: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]


@dataclass(frozen=True, slots=True)
class Mapping:
    """The assemblies by target, and the tensors that become nothing (name → name in the model).

    `towers` are those of the unused that belong to the other parts of a composite model.
    """

    assemblies: dict[str, Assembly] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    towers: frozenset[str] = frozenset()


def map_names(model: PreTrainedModel, names: Iterable[str], model_type: str) -> Mapping:
    """The mapping of the tensors `names` to the parameters of `model`.

    A composite checkpoint (`model_type` is its own) keeps the text model under a prefix. For some
    architectures transformers' mapping of the text model drops it; for the others the usual
    prefixes are tried, then the mapping of the composite model.
    """
    names = list(names)
    transforms = get_model_conversion_mapping(model)
    best = _map(model, {name: name for name in names}, transforms)
    for prefix, replacement in _TEXT_PREFIXES:
        if best.unused and any(name.startswith(prefix) for name in names):
            keys = {name: _replace(name, prefix, replacement) for name in names}
            best = _better(best, _map(model, keys, get_model_conversion_mapping(model)))
    if model_type == model.config.model_type:
        return best
    composite: list[WeightTransform] | None
    composite = get_checkpoint_conversion_mapping(model_type)  # type: ignore[no-untyped-call]
    if best.unused and composite:
        best = _better(best, _map(model, {name: name for name in names}, composite))
    return replace(best, towers=frozenset(filter(_is_tower, best.unused)))


def ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers drops the unused tensor `name` (in the model's terms) in silence."""
    return _search(_ignored_when_unexpected(model), name)


def optional(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers accepts that parameter `name` is not in the checkpoint."""
    return _search(model._keys_to_ignore_on_load_missing or (), name)


_TEXT_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.", ""),
    ("model.text_model.", "model."),
    ("model.", ""),
)
"""Where composite checkpoints keep the text model, and where a text model alone has it."""


_TEXT_PARTS = {"language_model", "text_model", "llm", "layers", "embed_tokens", "norm", "lm_head"}


def _is_tower(name: str) -> bool:
    """Whether a tensor of a composite checkpoint lies outside its text model."""
    return _TEXT_PARTS.isdisjoint(name.split(".")[:2])


def _replace(name: str, prefix: str, replacement: str) -> str:
    return replacement + name.removeprefix(prefix) if name.startswith(prefix) else name


def _better(old: Mapping, new: Mapping) -> Mapping:
    return new if len(new.assemblies) > len(old.assemblies) else old


def _map(
    model: PreTrainedModel, keys: dict[str, str], transforms: Sequence[WeightTransform]
) -> Mapping:
    """The mapping of tensors (name → key that transformers is told), in transformers' order."""
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    mapping = Mapping()
    for name, key in sorted(keys.items(), key=lambda item: dot_natural_key(item[1])):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:  # transformers: should not have been renamed
            target, pattern = rename_source_key(key, [], [], prefix, state)
        if target not in state:  # what the composite model calls its text model
            target = _replace(target, *_TEXT_PREFIXES[0])
        if target not in state:
            mapping.unused[name] = target
            continue
        converter = None if pattern is None else by_pattern[pattern]
        _collect(mapping.assemblies, target, converter, pattern or "", name)
    return mapping


def _collect(
    assemblies: dict[str, Assembly],
    target: str,
    converter: WeightConverter | None,
    pattern: str,
    name: str,
) -> None:
    if target not in assemblies:
        assemblies[target] = Assembly(target, deepcopy(converter), {})
    sources = assemblies[target].sources
    if converter is None and sources:
        return  # two names for one parameter: transformers keeps the first
    sources.setdefault(pattern, []).append(name)


def _ignored_when_unexpected(model: PreTrainedModel) -> set[str]:
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    # as PreTrainedModel._adjust_missing_and_unexpected_keys does
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def _search(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
