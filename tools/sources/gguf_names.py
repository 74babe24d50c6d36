"""Which tensors of a GGUF file become which parameters of the model.

gguf's own table gives the names; what llama.cpp's converter did to the values is undone by the
rules of `gguf_transforms`. An architecture without rules is mapped by its names alone.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import gguf
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)

from tierrun.engine.architecture import expert_parameters, experts_modules
from tierrun.io.errors import CheckpointError
from tierrun.tools.mapping import Assembly, Mapping
from tierrun.tools.sources.gguf_transforms import (
    Rearrange,
    interleave,
    is_tested,
    rules_of,
    transpose,
)

log = logging.getLogger(__name__)

_SUFFIXES = (".weight", ".bias", ".scale")

_ALIASES = (
    (r"e_score_correction_bias$", "e_score_correction.bias"),
    (r"\.dt_bias$", ".dt_proj.bias"),
    (r"\.router\.weight$", ".router.layer.weight"),
    (r"\.router\.scale$", ".router.proj.scale"),
    (r"\.router\.per_expert_scale$", ".experts.down_proj.scale"),
)
"""Parameters of transformers that gguf's table knows by another name only."""

_T = gguf.MODEL_TENSOR

_EXPERTS: dict[str, tuple[tuple[gguf.MODEL_TENSOR, ...], tuple[gguf.MODEL_TENSOR, ...]]] = {
    "gate_up_proj": ((_T.FFN_GATE_EXP, _T.FFN_UP_EXP), (_T.FFN_GATE, _T.FFN_UP)),
    "up_proj": ((_T.FFN_UP_EXP,), (_T.FFN_UP,)),
    "down_proj": ((_T.FFN_DOWN_EXP,), (_T.FFN_DOWN,)),
}
"""A matrix of the experts → tensors of all experts, and of one expert each (old files)."""

_UNUSED = (r"rope_freqs\.weight", r"blk\.\d+\.rope_freqs\.weight")
"""What the configuration says already."""


def map_gguf(model: PreTrainedModel, names: Iterable[str], architecture: str) -> Mapping:
    """The mapping of the GGUF tensors `names` to the parameters of the meta model `model`.

    A parameter without tensors is left out: the blueprint names it, unless it is tied.

    Raises:
        CheckpointError: gguf does not know `architecture`, or a tensor has no place.
    """
    naming = _Naming.of(model, names, architecture)
    if not is_tested(architecture):
        log.warning(
            "GGUF files of %s have not been tested: their weights are taken as they are, although "
            "llama.cpp may have changed some",
            architecture,
        )
    found = {target: naming.place(target) for target in model.state_dict()}
    assemblies = {target: assembly for target, assembly in found.items() if assembly}
    used = {name for assembly in assemblies.values() for name in assembly.names}
    unused = sorted(naming.names - used)
    _refuse_unplaced(naming, unused, architecture)
    # all of them are expected, like the towers of a model that sees
    return Mapping(assemblies, {name: name for name in unused}, frozenset(unused))


@dataclass(frozen=True, slots=True)
class _Naming:
    """What every placement looks at; `experts` are the matrices of experts, with their module."""

    model: PreTrainedModel
    names: frozenset[str]
    architecture: str
    table: gguf.TensorNameMap
    experts: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, names: Iterable[str], architecture: str) -> "_Naming":
        number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)
        if number is None:
            raise CheckpointError(
                f"gguf {version('gguf')} does not know the architecture {architecture}; "
                "is there a newer gguf package?"
            )
        table = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
        experts = {
            f"{path}.{name}": module
            for path, module in experts_modules(model).items()
            for name in expert_parameters(module)
        }
        return cls(model, frozenset(names), architecture, table, experts)

    def place(self, target: str) -> Assembly | None:
        """How `target` is made, or None where the file has nothing for it."""
        if target in self.experts:
            return self._place_experts(target, self.experts[target])
        for rule in rules_of(self.architecture):
            parts = rule.sources(target)
            found = None if parts is None else self._find_all(parts)
            if found is not None:
                return _assembly(target, found, [Rearrange(rule.undo(self.model.config))])
        found = self._find_all([target])
        return None if found is None else _assembly(target, found, [])

    def _find_all(self, parameters: Sequence[str]) -> list[str] | None:
        """The tensors called as `parameters` are, or None unless the file has them all."""
        found = [name for parameter in parameters if (name := self._find(parameter))]
        return found if len(found) == len(parameters) else None

    def _find(self, parameter: str) -> str | None:
        for spelling in _spellings(parameter):
            name = self.table.get_name(spelling, try_suffixes=_SUFFIXES)
            # parameters without a suffix: sinks, scalars, correction biases
            for candidate in (name, f"{name}.weight", f"{name}.bias"):
                if candidate in self.names:
                    return candidate
        return None

    def _place_experts(self, target: str, module: nn.Module) -> Assembly | None:
        block = _block(target)
        matrix = target.rpartition(".")[2]
        suffix = ".bias" if matrix.endswith("_bias") else ".weight"
        together, each = _EXPERTS[matrix.removesuffix("_bias")]
        after = _orient(module, len(together), is_matrix=suffix == ".weight")
        merged = _named(_T.FFN_GATE_UP_EXP, block) + suffix
        if len(together) == 2 and module.is_concatenated and merged in self.names:
            return _assembly(target, [merged], after[1:])
        names = [_named(tensor, block) + suffix for tensor in together]
        if self.names.issuperset(names):
            return _assembly(target, names, after)
        separate = [self._numbered(_named(tensor, block), suffix) for tensor in each]
        if not all(separate):
            return None
        return _assembly(target, separate, [MergeModulelist(dim=0), *after])

    def _numbered(self, stem: str, suffix: str) -> list[str]:
        """The tensors `stem.0.weight`, `stem.1.weight`, … that are there, in that order."""
        pattern = re.compile(rf"{re.escape(stem)}\.(\d+){re.escape(suffix)}")
        found = {int(match[1]): name for name in self.names if (match := pattern.fullmatch(name))}
        return [found[number] for number in sorted(found)]


def _orient(module: nn.Module, parts: int, *, is_matrix: bool) -> list[ConversionOps]:
    """From gate and up (if `parts` is 2), each [E, out, in], to the order that `module` has."""
    operations: list[ConversionOps] = []
    if parts == 2:
        operations.append(Concatenate(dim=1) if module.is_concatenated else Rearrange(interleave))
    if is_matrix and module.is_transposed:
        operations.append(Rearrange(transpose))
    return operations


def _assembly(
    target: str, sources: Sequence[str] | Sequence[list[str]], operations: list[ConversionOps]
) -> Assembly:
    """`operations` on `sources` (tensors, or lists of one tensor per expert) give `target`."""
    lists = [[one] if isinstance(one, str) else one for one in sources]
    by_pattern = {names[0]: names for names in lists}
    if not operations:
        return Assembly(target, None, by_pattern)
    return Assembly(target, WeightConverter(list(by_pattern), target, operations), by_pattern)


def _named(tensor: gguf.MODEL_TENSOR, block: int) -> str:
    return gguf.TENSOR_NAMES[tensor].format(bid=block)


def _block(parameter: str) -> int:
    """The layer that `parameter` belongs to, as its name says."""
    match = re.search(r"\.(\d+)\.", parameter)
    if match is None:
        raise CheckpointError(f"{parameter} is in no layer: its GGUF name cannot be told")
    return int(match[1])


def _spellings(parameter: str) -> Iterator[str]:
    yield parameter
    for pattern, replacement in _ALIASES:
        spelling = re.sub(pattern, replacement, parameter)
        if spelling != parameter:
            yield spelling


def _refuse_unplaced(naming: _Naming, unused: Iterable[str], architecture: str) -> None:
    """Every tensor left over must be one that the model is known not to want.

    Raises:
        CheckpointError: names those that are not.
    """
    extra = _prediction_blocks(naming.names, naming.model.config.num_hidden_layers)
    strange = [name for name in unused if not _is_dispensable(name, extra)]
    if strange:
        raise CheckpointError(
            f"{len(strange)} tensors of this {architecture} file have no place in "
            f"{naming.model.config.model_type}: {', '.join(strange[:3])} …; is the configuration "
            "another model's? If not, convert the original checkpoint instead"
        )


def _prediction_blocks(names: Collection[str], num_layers: int) -> set[int]:
    """The blocks after the model's own that predict further tokens: they have `nextn` tensors."""
    found = {int(match[1]) for name in names if (match := re.match(r"blk\.(\d+)\.nextn\.", name))}
    return {block for block in found if block >= num_layers}


def _is_dispensable(name: str, prediction_blocks: Collection[int]) -> bool:
    match = re.match(r"blk\.(\d+)\.", name)
    if match is not None and int(match[1]) in prediction_blocks:
        return True
    return any(re.fullmatch(pattern, name) for pattern in _UNUSED)
