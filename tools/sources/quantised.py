"""A checkpoint in safetensors whose weights are quantised, in a format that tierrun keeps."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from tierrun.engine.codecs.expand import dequantise
from tierrun.engine.codecs.planes import Fields
from tierrun.io.errors import CheckpointError
from tierrun.tools.mapping import Mapping, map_names
from tierrun.tools.sources.checkpoint import ModelSource
from tierrun.tools.sources.files import read_json
from tierrun.tools.sources.packing import Packing
from tierrun.tools.sources.quantised_formats import recognise, weight_groups
from tierrun.tools.sources.quantised_tensors import QuantisedTensor
from tierrun.tools.sources.safetensors import Checkpoint

_METHODS = ("fp8", "mxfp4", "modelopt", "compressed-tensors")
_PIECE = 1 << 20
"""Elements that are expanded at once: their temporaries are several times larger."""


def open_checkpoint(directory: Path, name: str) -> ModelSource:
    """The checkpoint in `directory`, quantised or not.

    Raises:
        CheckpointError: as `Checkpoint.open`; a method of quantising that is not supported, or a
            part of a quantised weight missing.
    """
    plain = Checkpoint.open(directory, name)
    try:
        config = _quantisation(directory, plain.config)
        return plain if config is None else QuantisedCheckpoint.of(plain, config)
    except BaseException:
        plain.close()
        raise


@dataclass(frozen=True, slots=True)
class QuantisedCheckpoint:
    """`plain` with its quantised `weights` as if they were numbers, fp32 to whoever reads them.

    `parts` are the tensors that they are made of, and that are not shown.
    """

    plain: Checkpoint
    weights: dict[str, QuantisedTensor]
    parts: frozenset[str]
    lossy: frozenset[str] = frozenset()

    @classmethod
    def of(cls, plain: Checkpoint, config: dict[str, Any]) -> Self:
        """`plain`, quantised as `config` and the tensors themselves say."""
        try:
            found = recognise(_Tensors(plain), list(plain.tensors), config)
        except CheckpointError as error:
            raise CheckpointError(f"{plain.directory}: {error}") from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{plain.directory}: its quantization_config or a quantised tensor is malformed "
                f"({error!r})"
            ) from None
        return cls(plain, found.weights, frozenset(found.parts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.plain.close()

    @property
    def directory(self) -> Path:
        return self.plain.directory

    @property
    def model_id(self) -> str:
        return self.plain.model_id

    def fingerprint(self) -> str:
        return self.plain.fingerprint()

    def mapping(self, model: PreTrainedModel) -> Mapping:
        names = [name for name in self.plain.tensors if name not in self.parts]
        names += [name for name in self.weights if name not in self.plain.tensors]
        return map_names(model, names, str(self.plain.config.get("model_type")))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights[name].shape if name in self.weights else self.plain.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.weights else self.plain.dtype(name)

    def packing(self, name: str) -> Packing | None:
        return self.weights[name].packing if name in self.weights else None

    def fields(self, name: str, start: int, stop: int) -> Fields:
        """Rows `start` to `stop` of the quantised weight `name`; see `PackedSource`."""
        try:
            return self.weights[name].fields(self.plain, start, stop)
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory}: {error}") from None

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Tensor `name` in fresh memory, or of its first dimension only `row` ([1, …])."""
        if name not in self.weights:
            return self.plain.read(name, row)
        shape, axis = self.shape(name), self.weights[name].packing.axis
        moved = [n for dim, n in enumerate(shape) if dim != axis]
        count = prod(moved)
        start, stop = 0, count
        if row is not None:
            moved[0], count = 1, count // moved[0]
            start, stop = row * count, (row + 1) * count
        values = torch.cat(list(self._expanded(name, start, stop)))
        return values.view(*moved, -1).movedim(-1, axis).contiguous()

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of tensor `name`, counted in memory order ([stop - start])."""
        if name not in self.weights:
            return self.plain.elements(name, start, stop)
        weight = self.weights[name]
        if weight.packing.axis != len(weight.shape) - 1:
            return self.read(name).flatten()[start:stop]
        first, last = start // weight.columns, -(-stop // weight.columns)
        values = torch.cat(list(self._expanded(name, first, last))).flatten()
        return values[start - first * weight.columns : stop - first * weight.columns]

    def _expanded(self, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Rows of a quantised weight, fp32 [rows, columns] at a time."""
        weight = self.weights[name]
        step = max(1, _PIECE // weight.columns)
        for first in range(start, stop, step):
            fields = self.fields(name, first, min(first + step, stop))
            yield dequantise(weight.packing.codec, fields)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """`plain` as `recognise` looks at it."""

    plain: Checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self.plain.tensors

    def dtype(self, name: str) -> torch.dtype:
        return self.plain.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.plain.shape(name)

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.plain.elements(name, start, stop)


def _quantisation(directory: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint, of its text model, or of ModelOpt's own file."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    for part in (config, *inner):
        found = part.get("quantization_config")
        if isinstance(found, dict) and found:
            _check_supported(directory, found)
            return found
    if (directory / "hf_quant_config.json").is_file():
        found = read_json(directory / "hf_quant_config.json").get("quantization")
        if isinstance(found, dict) and found.get("quant_algo"):
            _check_supported(directory, found | {"quant_method": "modelopt"})
            return found
    return None


def _check_supported(directory: Path, config: dict[str, Any]) -> None:
    method = str(config.get("quant_method", "unknown method"))
    why = _unsupported(method, config)
    if why:
        raise CheckpointError(
            f"{directory} is a quantised checkpoint ({why}): not supported; use the bf16 one, or "
            f"one in {', '.join(_METHODS)}"
        )


def _unsupported(method: str, config: dict[str, Any]) -> str | None:
    """What of the quantisation tierrun has no codec for."""
    if method not in _METHODS:
        return method
    algorithm = str(config.get("quant_algo") or "")
    if method == "modelopt" and algorithm and algorithm not in ("NVFP4", "FP8", "MIXED_PRECISION"):
        return f"modelopt, {algorithm}"
    if method == "compressed-tensors":
        return _unsupported_groups(config)
    return None


def _unsupported_groups(config: dict[str, Any]) -> str | None:
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return f"compressed-tensors, sparse: {sparsity['format']}"
    transforms = config.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        return "compressed-tensors, with transforms"
    for group in weight_groups(config):
        if group.get("type") == "int" and group.get("num_bits") not in (4, 8):
            return f"compressed-tensors, {group.get('num_bits')} bits"
    return None
