"""In what form the matrices of a layer's records are stored."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from tierrun.engine.codecs.dense import CODECS
from tierrun.io.errors import CheckpointError
from tierrun.tools.assembling import ExpertParameter
from tierrun.tools.choices import Choices
from tierrun.tools.matrices import (
    ALL,
    DenseMatrix,
    KeptMatrix,
    MatrixRecipe,
    QuantisedMatrix,
)
from tierrun.tools.tracing import Selection

_GATE_UP = "gate_up_proj"


def choose_matrices(
    choices: Choices, where: str, name: str, parameter: ExpertParameter, *, interleaved: bool
) -> list[MatrixRecipe]:
    """The recipe of `parameter`, called `name`, of the records at `where`.

    Gate and up (`interleaved`: row by row) become two matrices where their codecs differ.

    Raises:
        CheckpointError: experts packed in different ways, or of a dtype that cannot be stored.
    """
    names = parameter.names(0)
    _check_alike(choices, where, parameter)
    kinds = {choices.kind(name) for name in names}
    whole = DenseMatrix(name, parameter, ALL, torch.float32)
    if kinds == {None}:
        return [_unpacked(choices, where, whole, names)]
    selection = _trace(choices, parameter)
    if selection is None:
        choices.note_dense(kinds, parameter.full_shape[0], _bytes(whole))
        return [_unpacked(choices, where, whole, names)]
    parts = [whole]
    if name == _GATE_UP and len(kinds) > 1:
        parts = _gate_and_up(whole, interleaved)
    return [_chosen(choices, where, part, selection.part(part.rows)) for part in parts]


def _check_alike(choices: Choices, where: str, parameter: ExpertParameter) -> None:
    """Records of a layer are alike: what one expert is packed in, all must be."""
    first = parameter.names(0)
    for expert in range(1, parameter.full_shape[0] if parameter.separate else 1):
        for name, other in zip(parameter.names(expert), first, strict=True):
            ours, theirs = choices.kind(name), choices.kind(other)
            if ours != theirs:
                raise CheckpointError(
                    f"{where}: {name} is {_called(ours)}, {other} {_called(theirs)}; the experts "
                    "of a layer must be in one codec: quantise the model again, with a llama.cpp "
                    "that merges experts if it is a GGUF"
                )


def _called(kind: object) -> str:
    return getattr(kind, "name", "not quantised")


def _trace(choices: Choices, parameter: ExpertParameter) -> Selection | None:
    names = parameter.names(0)
    grids = {name: choices.grid(name, sliced=not parameter.separate) for name in names}
    if any(grid.axis == 0 and not parameter.separate for grid in grids.values()):
        return None
    return choices.tracer.trace(grids, lambda labels: parameter.make(labels, 0))


def _gate_and_up(whole: DenseMatrix, interleaved: bool) -> list[DenseMatrix]:
    half = whole.shape[0] // 2
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (
        slice(0, half), slice(half, None),
    )  # fmt: skip
    return [replace(whole, name="gate_proj", rows=gate), replace(whole, name="up_proj", rows=up)]


def _chosen(choices: Choices, where: str, dense: DenseMatrix, selection: Selection) -> MatrixRecipe:
    """`dense`, whose rows are `selection`, packed as they are if they all are in one codec."""
    parameter = dense.parameter
    names = [parameter.names(0)[index] for index in torch.unique(selection.tensors).tolist()]
    kind, *others = {choices.kind(name) for name in names}
    if kind is None or others or selection.columns is not None:
        if kind is not None or others:
            choices.note_dense([kind, *others], parameter.full_shape[0], _bytes(dense))
        return _unpacked(choices, where, dense, names)
    grid = choices.grid(names[0], sliced=not parameter.separate)
    rows = 0 if parameter.separate else grid.rows
    return KeptMatrix(dense.name, parameter, kind, selection, grid.columns, rows)


def _unpacked(
    choices: Choices, where: str, dense: DenseMatrix, names: Sequence[str]
) -> MatrixRecipe:
    """`dense` in the dtype of its tensors (`names` are the first expert's), or quantised."""
    parameter = dense.parameter
    every = _of_all_experts(parameter, names)
    dtype = choices.dtype(parameter.assembly.target, every)
    if dtype not in CODECS:
        raise CheckpointError(f"{where}: {every[0]} has dtype {dtype}: not supported yet")
    dense = replace(dense, dtype=dtype)
    asked = choices.quantising
    is_lossy, num_experts = choices.is_lossy(every), parameter.full_shape[0]
    codec = asked.lossy if is_lossy else asked.experts
    if codec is None or len(dense.shape) != 2:
        return dense
    quantised = QuantisedMatrix(dense, codec, choices.experts)
    if is_lossy:
        choices.note_lossy(codec, num_experts, num_experts * quantised.nbytes)
    return quantised


def _of_all_experts(parameter: ExpertParameter, names: Sequence[str]) -> list[str]:
    if not parameter.separate:
        return list(names)
    places = [parameter.names(0).index(name) for name in names]
    experts = [parameter.names(expert) for expert in range(parameter.full_shape[0])]
    return [of_one[place] for of_one in experts for place in places]


def _bytes(dense: DenseMatrix) -> int:
    """Of all experts."""
    return dense.parameter.full_shape[0] * prod(dense.shape) * dense.dtype.itemsize
