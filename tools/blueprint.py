"""Everything that a checkpoint becomes, settled and checked before any weight is read."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn
from transformers import PreTrainedModel

from tierrun.engine.architecture import expert_parameters, experts_modules, top_k
from tierrun.io.errors import CheckpointError
from tierrun.tools.mapping import Assembly, Mapping, ignored, optional
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

CODECS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
"""The codecs that hold a matrix as it is."""


@dataclass(frozen=True, slots=True)
class LayerRecipe:
    """The records of one experts module: its path, experts used per token, and matrices."""

    path: str
    top_k: int
    num_experts: int
    matrices: tuple[MatrixRecipe, ...]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Records by layer, resident weights, and the tensors that the model has no use for."""

    layers: tuple[LayerRecipe, ...]
    residents: tuple[ResidentRecipe, ...]
    unused: tuple[str, ...]


def draw(
    model: PreTrainedModel, mapping: Mapping, source: Source, precision: Precision
) -> Blueprint:
    """The blueprint of the meta model `model` from the tensors of `source`, as `mapping` says.

    Raises:
        CheckpointError: a dense model; a tensor missing, of a wrong shape or an unknown dtype; an
            architecture whose experts cannot be converted one by one.
        ModelError: a Mixture of Experts that transformers does not route.
    """
    modules = experts_modules(model)
    shadow = Shadow(source)
    layers = tuple(
        _layer(model, number, path, module, mapping, shadow, precision)
        for number, (path, module) in enumerate(modules.items())
    )
    in_records = {f"{layer.path}.{matrix.name}" for layer in layers for matrix in layer.matrices}
    residents = _residents(model, in_records, mapping, shadow, precision)
    _check_missing(model, in_records | {resident.name for resident in residents})
    _report_unused(model, mapping)
    return Blueprint(layers, residents, tuple(mapping.unused))


def _layer(
    model: PreTrainedModel,
    number: int,
    path: str,
    module: nn.Module,
    mapping: Mapping,
    shadow: Shadow,
    precision: Precision,
) -> LayerRecipe:
    where = f"layer {number} ({path})"
    matrices = []
    for name, parameter in expert_parameters(module).items():
        assembly = mapping.assemblies.get(f"{path}.{name}")
        if assembly is None:
            raise CheckpointError(
                f"{where}: the checkpoint has nothing that becomes {path}.{name}; "
                "is a shard missing?"
            )
        matrices.append(_matrix(model, where, name, assembly, parameter, shadow, precision))
    num_experts = matrices[0].full_shape[0]
    recipe = LayerRecipe(path, top_k(model, path), num_experts, tuple(matrices))
    _try_out(recipe, shadow)
    return recipe


def _matrix(
    model: PreTrainedModel,
    where: str,
    name: str,
    assembly: Assembly,
    parameter: torch.Tensor,
    shadow: Shadow,
    precision: Precision,
) -> MatrixRecipe:
    separate = is_separate(assembly)
    if separate:
        _check_separate(where, assembly, parameter.shape[0])
    else:
        _check_fused(where, assembly, parameter.shape[0], shadow)
    found = reduce(torch.promote_types, map(shadow.dtype, assembly.names))
    dtype = precision.stored(assembly.target, found)
    if dtype not in CODECS:
        raise CheckpointError(f"{where}: {assembly.names[0]} has dtype {dtype}: not supported yet")
    module = model.get_submodule(assembly.target.rpartition(".")[0])
    transposed = bool(module.is_transposed) and parameter.ndim == 3
    shape = tuple(parameter.shape)
    return MatrixRecipe(name, assembly, model, shape, transposed, separate, dtype)


def _check_separate(where: str, assembly: Assembly, num_experts: int) -> None:
    assert assembly.converter is not None
    for pattern in assembly.converter.source_patterns:
        names = assembly.sources.get(pattern, [])
        if len(names) == num_experts:
            continue
        if len(names) > num_experts:
            raise CheckpointError(
                f"{where}: {len(names)} tensors like {names[0]} for {num_experts} experts"
            )
        expert, missing = _first_missing(names, pattern, num_experts)
        raise CheckpointError(
            f"{where}, expert {expert}: tensor {missing} is missing; download the checkpoint again"
        )


def _first_missing(names: Sequence[str], pattern: str, num_experts: int) -> tuple[int, str]:
    """The first expert without a tensor among `names`, which differ in the expert's number."""
    rows = [name.split(".") for name in names]
    columns = [c for c, parts in enumerate(zip(*rows, strict=False)) if len(set(parts)) > 1]
    if len(columns) != 1:
        return (0, f"{pattern} (only {names[0]} is there)" if names else pattern)
    present = {int(row[columns[0]]) for row in rows}
    expert = min(set(range(num_experts)) - present)
    return expert, ".".join(_with(rows[0], columns[0], str(expert)))


def _with(parts: list[str], column: int, value: str) -> list[str]:
    return [*parts[:column], value, *parts[column + 1 :]]


def _check_fused(where: str, assembly: Assembly, num_experts: int, shadow: Shadow) -> None:
    for name in assembly.names:
        shape = shadow.shape(name)
        if not shape or shape[0] != num_experts:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {list(shape)}, wanted {num_experts} experts "
                "in its first dimension"
            )


def _try_out(recipe: LayerRecipe, shadow: Shadow) -> None:
    """Make every differently shaped expert on the meta device; raises as `MatrixRecipe.make`."""
    for matrix in recipe.matrices:
        seen = set()
        for expert in range(recipe.num_experts):
            shapes = tuple(map(shadow.shape, matrix.names(expert)))
            if shapes not in seen:
                seen.add(shapes)
                matrix.make(shadow, expert)


def _residents(
    model: PreTrainedModel,
    in_records: set[str],
    mapping: Mapping,
    shadow: Shadow,
    precision: Precision,
) -> tuple[ResidentRecipe, ...]:
    state = model.state_dict()
    residents = []
    for target, assembly in mapping.assemblies.items():
        if target in in_records:
            continue
        for name, tensor in whole(assembly, model, shadow).items():
            if name not in state:
                continue
            if tensor.shape != state[name].shape:
                raise CheckpointError(
                    f"tensor {assembly.names[0]} has shape {list(tensor.shape)}, the model wants "
                    f"{list(state[name].shape)} for {name}; is the config.json another model's?"
                )
            dtype = precision.stored(name, tensor.dtype)
            residents.append(ResidentRecipe(name, assembly, model, tuple(tensor.shape), dtype))
    return tuple(residents)


def _check_missing(model: PreTrainedModel, made: set[str]) -> None:
    tied = _tied_groups(model)
    for name in model.state_dict():
        if name in made or optional(model, name):
            continue
        if made.isdisjoint(tied.get(name, ())):
            raise CheckpointError(
                f"tensor {name} is missing from the checkpoint; is a shard missing?"
            )


def _tied_groups(model: PreTrainedModel) -> dict[str, set[str]]:
    """For each tied parameter, all names of the weight that it shares."""
    groups: dict[str, set[str]] = {}
    for target, origin in model.all_tied_weights_keys.items():
        group = groups.setdefault(origin, {origin})
        group.add(target)
        groups[target] = group
    return groups


def _report_unused(model: PreTrainedModel, mapping: Mapping) -> None:
    """What transformers drops in silence too is told quietly; anything else may be a mistake."""
    unused = mapping.unused.items()
    expected = {n for n, target in unused if ignored(model, target)} | mapping.towers
    surprising = [name for name in mapping.unused if name not in expected]
    for level, names in ((logging.INFO, sorted(expected)), (logging.WARNING, surprising)):
        if names:
            examples = ", ".join(names[:3])
            log.log(level, "%d tensors are not used by the model: %s …", len(names), examples)
