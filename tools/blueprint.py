"""Everything that a checkpoint becomes, settled and checked before any weight is read."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn
from transformers import PreTrainedModel

from tierrun.engine.architecture import expert_parameters, experts_modules, top_k
from tierrun.engine.codecs.dense import CODECS
from tierrun.io.errors import CheckpointError
from tierrun.tools.completeness import check_experts, check_parameters, check_shape
from tierrun.tools.mapping import Assembly, Mapping, ignored
from tierrun.tools.precision import Precision
from tierrun.tools.recipes import (
    MatrixRecipe,
    ResidentRecipe,
    Shadow,
    Source,
    is_separate,
    whole,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerRecipe:
    """The records of one experts module: its path, experts used per token, and matrices."""

    path: str
    top_k: int
    num_experts: int
    matrices: tuple[MatrixRecipe, ...]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Records by layer, and resident weights."""

    layers: tuple[LayerRecipe, ...]
    residents: tuple[ResidentRecipe, ...]


def draw(
    model: PreTrainedModel, mapping: Mapping, source: Source, precision: Precision
) -> Blueprint:
    """The blueprint of the meta model `model` from the tensors of `source`, as `mapping` says.

    Raises:
        CheckpointError: a dense model; a tensor missing, of a wrong shape or an unknown dtype; an
            architecture whose experts cannot be converted one by one.
        ModelError: a Mixture of Experts that transformers does not route.
    """
    drawing = _Drawing(model, mapping, Shadow(source), precision)
    modules = enumerate(experts_modules(model).items())
    layers = tuple(drawing.layer(number, path, module) for number, (path, module) in modules)
    in_records = {f"{layer.path}.{matrix.name}" for layer in layers for matrix in layer.matrices}
    residents = tuple(drawing.residents(in_records))
    check_parameters(model, in_records | {resident.name for resident in residents})
    _report_unused(model, mapping)
    return Blueprint(layers, residents)


@dataclass(frozen=True, slots=True)
class _Drawing:
    """What every recipe is drawn from; `shadow` has the tensors' shapes and dtypes."""

    model: PreTrainedModel
    mapping: Mapping
    shadow: Shadow
    precision: Precision

    def layer(self, number: int, path: str, module: nn.Module) -> LayerRecipe:
        where = f"layer {number} ({path})"
        matrices = tuple(
            self.matrix(where, f"{path}.{name}", parameter, bool(module.is_transposed))
            for name, parameter in expert_parameters(module).items()
        )
        recipe = LayerRecipe(path, top_k(self.model, path), matrices[0].full_shape[0], matrices)
        self._try_out(recipe)
        return recipe

    def matrix(
        self, where: str, target: str, parameter: torch.Tensor, transposed: bool
    ) -> MatrixRecipe:
        assembly = self.mapping.assemblies.get(target)
        if assembly is None:
            raise CheckpointError(
                f"{where}: the checkpoint has nothing that becomes {target}; is a shard missing?"
            )
        check_experts(where, assembly, parameter.shape[0], self.shadow)
        return MatrixRecipe(
            target.rpartition(".")[2],
            assembly,
            self.model,
            tuple(parameter.shape),
            transposed and parameter.ndim == 3,
            is_separate(assembly),
            self._matrix_dtype(where, assembly),
        )

    def _matrix_dtype(self, where: str, assembly: Assembly) -> torch.dtype:
        """The dtype of a matrix in every record: the widest that an expert has."""
        found = reduce(torch.promote_types, map(self.shadow.dtype, assembly.names))
        dtype = self.precision.stored(assembly.target, found)
        if dtype not in CODECS:
            name = assembly.names[0]
            raise CheckpointError(f"{where}: {name} has dtype {dtype}: not supported yet")
        return dtype

    def _try_out(self, recipe: LayerRecipe) -> None:
        """Make each differently shaped expert of shadows; raises as `MatrixRecipe.make`."""
        for matrix in recipe.matrices:
            seen = set()
            for expert in range(recipe.num_experts):
                shapes = tuple(map(self.shadow.shape, matrix.names(expert)))
                if shapes not in seen:
                    seen.add(shapes)
                    matrix.make(self.shadow, expert)

    def residents(self, in_records: set[str]) -> Iterator[ResidentRecipe]:
        """The recipe of every parameter and persistent buffer that is not `in_records`."""
        state = self.model.state_dict()
        for target, assembly in self.mapping.assemblies.items():
            if target in in_records:
                continue
            for name, tensor in whole(assembly, self.model, self.shadow).items():
                if name in state:
                    check_shape(name, assembly, tensor.shape, state[name].shape)
                    dtype = self.precision.stored(name, tensor.dtype)
                    shape = tuple(tensor.shape)
                    yield ResidentRecipe(name, assembly, self.model, shape, dtype)


def _report_unused(model: PreTrainedModel, mapping: Mapping) -> None:
    """What transformers drops in silence too is told quietly; anything else may be a mistake."""
    unused = mapping.unused.items()
    expected = {n for n, target in unused if ignored(model, target)} | mapping.towers
    surprising = [name for name in mapping.unused if name not in expected]
    for level, names in ((logging.INFO, sorted(expected)), (logging.WARNING, surprising)):
        if names:
            examples = ", ".join(names[:3])
            log.log(level, "%d tensors are not used by the model: %s …", len(names), examples)
