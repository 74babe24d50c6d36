"""In what form each weight outside the experts is stored."""

import torch
from transformers import PreTrainedModel

from tierrun.engine.architecture import experts_modules
from tierrun.engine.stored import can_store
from tierrun.tools.assembling import in_order, is_streamed, whole
from tierrun.tools.choices import Choices
from tierrun.tools.mapping import Assembly
from tierrun.tools.residents import (
    DenseResident,
    InputOrder,
    KeptResident,
    QuantisedResident,
    ResidentRecipe,
)
from tierrun.tools.tracing import Selection
from tierrun.tools.widening import common

_ROUTERS = {"gate", "router"}
"""What architectures call their routers, where those have modules of their own."""


def choose_resident(
    choices: Choices, model: PreTrainedModel, assembly: Assembly, name: str, made: torch.Tensor
) -> list[ResidentRecipe]:
    """The recipe of the weight `name` that `assembly` makes, `made` on the meta device.

    There is a second where its columns are stored in an order of their own, which that one keeps.
    """
    dtype = choices.precision.stored(name, made.dtype)
    streamed = is_streamed(assembly)
    dense = DenseResident(name, assembly, model, tuple(made.shape), dtype, streamed)
    kinds = {choices.kind(source) for source in assembly.names}
    kind, selection = common(kinds), None
    if kind is not None and _computes_packed(model, name):
        selection = _select(choices, dense)
    if selection is None or kind is None:
        if kinds != {None}:
            choices.note_dense(kinds, 1, dense.nbytes)
        return [_unpacked(choices, dense)]
    names, order = in_order(assembly), selection.columns
    if order is None:
        return [KeptResident(name, dense.shape, kind, names, selection, None)]
    inputs = InputOrder(f"{name}.inputs", order.argsort())
    return [KeptResident(name, dense.shape, kind, names, selection, inputs.name), inputs]


def _computes_packed(model: PreTrainedModel, name: str) -> bool:
    """Whether `name` is the weight of a linear or embedding module that leaves it as stored."""
    path, _, attribute = name.rpartition(".")
    return attribute == "weight" and can_store(model.get_submodule(path))


def _select(choices: Choices, dense: DenseResident) -> Selection | None:
    """Which rows of its sources, in the order of `in_order`, the weight is."""
    assembly = dense.assembly
    grids = {name: choices.grid(name, sliced=False) for name in in_order(assembly)}
    by_row = all(grid.axis == len(grid.shape) - 1 for grid in grids.values())
    if assembly.converter is None and by_row:  # spares the labels of an embedding
        rows = torch.arange(dense.shape[0])
        return Selection(torch.zeros_like(rows), rows, None)
    return choices.tracer.trace(
        grids, lambda labels: whole(assembly, dense.model, labels)[dense.name]
    )


def _unpacked(choices: Choices, dense: DenseResident) -> ResidentRecipe:
    """`dense` itself, or quantised where that was asked for."""
    asked = choices.quantising
    is_lossy = choices.is_lossy(dense.assembly.names)
    codec = asked.lossy if is_lossy else asked.residents
    if codec is None or not _computes_packed(dense.model, dense.name) or _is_router(dense):
        return dense
    quantised = QuantisedResident(dense, codec, choices.residents)
    if is_lossy:
        choices.note_lossy(codec, 1, quantised.nbytes)
    return quantised


def _is_router(dense: DenseResident) -> bool:
    """Whether the weight scores experts (or weighs one): small, and everything hangs on it."""
    if not _ROUTERS.isdisjoint(dense.name.split(".")):
        return True
    block = dense.name.rpartition(".")[0].rpartition(".")[0]
    for path, module in experts_modules(dense.model).items():
        parent = path.rpartition(".")[0]
        if block == parent or block.startswith(f"{parent}."):
            experts = next(module.parameters()).shape[0]
            return dense.shape[0] in (1, experts)
    return False
