"""Running transformers' conversion operations, on whole tensors or on one expert's slices.

They run on a `Source`: on the checkpoint while writing, and before that on its shadow, tensors on
the meta device, which proves names, shapes and dtypes without reading a byte, and on labels
(`tracing`). Only this file runs them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist

from tierrun.io.errors import CheckpointError
from tierrun.tools.mapping import Assembly
from tierrun.tools.sources.source import Reads

_Slices = Mapping[str, torch.Tensor | list[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """One parameter of an experts module, made one expert at a time.

    `full_shape` is the module's own ([num_experts, …]); the result is [out, in], or [out] for a
    bias. `separate` says that the checkpoint has one tensor per expert.
    """

    assembly: Assembly
    model: PreTrainedModel
    full_shape: tuple[int, ...]
    transposed: bool
    separate: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full_shape[:0:-1] if self.transposed else self.full_shape[1:]

    def names(self, expert: int) -> list[str]:
        """The tensors that `expert` is made of."""
        if self.separate:
            return [names[expert] for names in self.assembly.sources.values()]
        return self.assembly.names

    def make(self, source: Reads, expert: int) -> torch.Tensor:
        """The matrix of `expert`, in the source's dtype; not always contiguous.

        Raises:
            CheckpointError: transformers' operations do not give one expert from its own slices.
        """
        slices = self._slices(source, expert)
        made = _run(self.assembly, slices, _OneExpert(self.model)).get(self.assembly.target)
        wanted = [1, *self.full_shape[1:]]
        if made is None or list(made.shape) != wanted:
            raise CheckpointError(
                f"{self.assembly.target}: expert {expert} wants {wanted}, "
                f"{self.names(expert)[0]} gives {None if made is None else list(made.shape)}; "
                "a damaged checkpoint, or an architecture that cannot be converted record by record"
            )
        return made[0].T if self.transposed else made[0]

    def _slices(self, source: Reads, expert: int) -> _Slices:
        """What the operations are given: lists, or tensors where `MergeModulelist` is passed by.

        That operation stacks a list, and takes a tensor for a list stacked already: no copy.
        """
        sources = self.assembly.sources.items()
        if self.separate:
            return {pattern: source.read(names[expert])[None] for pattern, names in sources}
        return {p: [source.read(name, expert) for name in names] for p, names in sources}


def is_separate(assembly: Assembly) -> bool:
    """Whether the sources of an experts parameter are one tensor per expert."""
    operations = [] if assembly.converter is None else assembly.converter.operations
    return bool(operations) and isinstance(operations[0], MergeModulelist)


def whole(assembly: Assembly, model: PreTrainedModel, source: Reads) -> dict[str, torch.Tensor]:
    """All parameters that `assembly` makes, by name, from whole tensors."""
    sources = assembly.sources.items()
    slices: _Slices
    slices = {pattern: [source.read(name) for name in names] for pattern, names in sources}
    return _run(assembly, slices, model)


def is_streamed(assembly: Assembly) -> bool:
    """Whether the weight is its sources one after the other in memory."""
    if assembly.converter is None:
        return True
    operations = assembly.converter.operations
    return len(operations) == 1 and isinstance(operations[0], Concatenate) and not operations[0].dim


def in_order(assembly: Assembly) -> list[str]:
    """The sources as `Concatenate` takes them: by source pattern, then as collected."""
    patterns = assembly.converter.source_patterns if assembly.converter else assembly.sources
    return [name for pattern in patterns for name in assembly.sources.get(pattern, ())]


@dataclass(frozen=True, slots=True)
class _OneExpert:
    """The model as conversion operations look at it, if it had one expert per layer."""

    model: PreTrainedModel

    @property
    def config(self) -> Any:
        return self.model.config

    def get_parameter(self, name: str) -> torch.Tensor:
        return self.model.get_parameter(name)[:1]


def _run(assembly: Assembly, slices: _Slices, model: Any) -> dict[str, torch.Tensor]:
    """What transformers makes of `slices`, by full parameter name.

    Raises:
        CheckpointError: an operation refuses them.
    """
    converter = assembly.converter
    if converter is None:
        (tensors,) = slices.values()
        return {assembly.target: tensors[0]}
    collected: dict[str, Any] = converter.collected_tensors
    collected.update(slices)  # tensors serve where transformers' loader puts futures
    try:
        made = converter.convert(assembly.target, model=model, config=model.config)
    except Exception as error:  # whatever torch or an operation raises on shapes it did not expect
        raise CheckpointError(
            f"{assembly.target} cannot be made from {assembly.names[0]}: {error}"
        ) from error
    return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}
