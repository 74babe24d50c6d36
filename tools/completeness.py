"""Whether a checkpoint has all that the model needs; what is missing is named."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from tierrun.io.errors import CheckpointError
from tierrun.tools.assembling import is_separate
from tierrun.tools.mapping import Assembly, optional
from tierrun.tools.sources.source import Shadow


def check_parameters(model: PreTrainedModel, made: set[str]) -> None:
    """Every weight of `model` must be among those `made`, itself or under a tied name.

    Raises:
        CheckpointError: names the first that is not.
    """
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


def check_experts(where: str, assembly: Assembly, num_experts: int, shadow: Shadow) -> None:
    """The sources of an experts parameter must be there for each of `num_experts`.

    Raises:
        CheckpointError: names `where`, the expert, and the tensor that is missing.
    """
    if is_separate(assembly):
        _check_separate(where, assembly, num_experts)
    else:
        _check_fused(where, assembly, num_experts, shadow)


def check_shape(name: str, assembly: Assembly, got: torch.Size, wanted: torch.Size) -> None:
    """What a parameter is made of must have the parameter's shape.

    Raises:
        CheckpointError: it has another.
    """
    if got != wanted:
        raise CheckpointError(
            f"tensor {assembly.names[0]} has shape {list(got)}, the model wants {list(wanted)} "
            f"for {name}; is the config.json another model's?"
        )


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
