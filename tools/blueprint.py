"""Everything that a checkpoint becomes, settled and checked before any weight is read."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from tierrun.engine.architecture import expert_parameters, experts_modules, top_k
from tierrun.io.errors import CheckpointError, UsageError
from tierrun.tools.assembling import ExpertParameter, is_separate, whole
from tierrun.tools.choices import Choices, Quantising
from tierrun.tools.completeness import check_experts, check_parameters, check_shape
from tierrun.tools.expert_choices import choose_matrices
from tierrun.tools.mapping import Mapping, ignored
from tierrun.tools.matrices import MatrixRecipe, QuantisedMatrix
from tierrun.tools.precision import Precision
from tierrun.tools.resident_choices import choose_resident
from tierrun.tools.residents import QuantisedResident, ResidentRecipe
from tierrun.tools.sources.source import Shadow, Source

log = logging.getLogger(__name__)

_NOTHING = Quantising()


@dataclass(frozen=True, slots=True)
class LayerRecipe:
    """The records of one experts module: its path, experts used per token, and matrices."""

    path: str
    top_k: int
    num_experts: int
    matrices: tuple[MatrixRecipe, ...]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Records by layer, resident weights, and how they were chosen."""

    layers: tuple[LayerRecipe, ...]
    residents: tuple[ResidentRecipe, ...]
    choices: Choices


def draw(
    model: PreTrainedModel,
    mapping: Mapping,
    source: Source,
    precision: Precision,
    quantising: Quantising = _NOTHING,
) -> Blueprint:
    """The blueprint of the meta model `model` from the tensors of `source`, as `mapping` says.

    Raises:
        CheckpointError: a dense model; a tensor missing, of a wrong shape or an unknown dtype; an
            architecture whose experts cannot be converted one by one.
        ModelError: a Mixture of Experts that transformers does not route.
        UsageError: `quantising` finds nothing to quantise.
    """
    choices = Choices(source, precision, quantising)
    drawing = _Drawing(model, mapping, choices, Shadow(source))
    modules = enumerate(experts_modules(model).items())
    layers = tuple(drawing.layer(number, path, module) for number, (path, module) in modules)
    targets = {m.parameter.assembly.target for layer in layers for m in layer.matrices}
    residents = tuple(drawing.residents(targets))
    check_parameters(model, targets | {resident.name for resident in residents})
    _report_unused(model, mapping)
    choices.notes.tell()
    _check_quantised(quantising, layers, residents)
    if quantising.lossy and not source.lossy:
        log.warning("--requant has nothing to do: every tensor is of a type that has a codec")
    return Blueprint(layers, residents, choices)


@dataclass(frozen=True, slots=True)
class _Drawing:
    """What every recipe is drawn from; `shadow` has the tensors' shapes and dtypes."""

    model: PreTrainedModel
    mapping: Mapping
    choices: Choices
    shadow: Shadow

    def layer(self, number: int, path: str, module: nn.Module) -> LayerRecipe:
        where = f"layer {number} ({path})"
        interleaved = not module.is_concatenated
        matrices: list[MatrixRecipe] = []
        for name, tensor in expert_parameters(module).items():
            parameter = self.parameter(where, f"{path}.{name}", tensor, bool(module.is_transposed))
            self._try_out(parameter)
            matrices += choose_matrices(
                self.choices, where, name, parameter, interleaved=interleaved
            )
        num_experts = matrices[0].parameter.full_shape[0]
        return LayerRecipe(path, top_k(self.model, path), num_experts, tuple(matrices))

    def parameter(
        self, where: str, target: str, tensor: torch.Tensor, transposed: bool
    ) -> ExpertParameter:
        assembly = self.mapping.assemblies.get(target)
        if assembly is None:
            raise CheckpointError(
                f"{where}: the checkpoint has nothing that becomes {target}; is a shard missing?"
            )
        check_experts(where, assembly, tensor.shape[0], self.shadow)
        return ExpertParameter(
            assembly,
            self.model,
            tuple(tensor.shape),
            transposed and tensor.ndim == 3,
            is_separate(assembly),
        )

    def _try_out(self, parameter: ExpertParameter) -> None:
        """Make each differently shaped expert of shadows; raises as `ExpertParameter.make`."""
        seen = set()
        for expert in range(parameter.full_shape[0]):
            shapes = tuple(map(self.shadow.shape, parameter.names(expert)))
            if shapes not in seen:
                seen.add(shapes)
                parameter.make(self.shadow, expert)

    def residents(self, in_records: set[str]) -> Iterator[ResidentRecipe]:
        """The recipe of every parameter and persistent buffer that is not `in_records`."""
        state = self.model.state_dict()
        for target, assembly in self.mapping.assemblies.items():
            if target in in_records:
                continue
            for name, tensor in whole(assembly, self.model, self.shadow).items():
                if name in state:
                    check_shape(name, assembly, tensor.shape, state[name].shape)
                    yield from choose_resident(self.choices, self.model, assembly, name, tensor)


def _check_quantised(
    asked: Quantising, layers: Sequence[LayerRecipe], residents: Sequence[ResidentRecipe]
) -> None:
    """What was asked for must have been possible somewhere."""
    matrices = [matrix for layer in layers for matrix in layer.matrices]
    if asked.experts and not any(isinstance(m, QuantisedMatrix) for m in matrices):
        codecs = ", ".join(sorted({m.codec for m in matrices if len(m.shape) == 2}))
        raise UsageError(
            f"--quant {asked.experts.name}: no expert can be quantised, all stay in {codecs}; "
            "leave it out"
        )
    if asked.residents and not any(isinstance(r, QuantisedResident) for r in residents):
        raise UsageError(
            f"--quant-resident {asked.residents.name}: no resident weight can be quantised; "
            "leave it out"
        )


def _report_unused(model: PreTrainedModel, mapping: Mapping) -> None:
    """What transformers drops in silence too is told quietly; anything else may be a mistake."""
    unused = mapping.unused.items()
    expected = {n for n, target in unused if ignored(model, target)} | mapping.towers
    surprising = [name for name in mapping.unused if name not in expected]
    for level, names in ((logging.INFO, sorted(expected)), (logging.WARNING, surprising)):
        if names:
            examples = ", ".join(names[:3])
            log.log(level, "%d tensors are not used by the model: %s …", len(names), examples)
