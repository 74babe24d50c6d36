"""The manifest that a store of a model would have, from its configuration alone.

Sizes are exact, places and checksums are zero: nothing of it can be read, only counted.
"""

from collections.abc import Iterable, Iterator
from math import prod

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tierrun.engine.architecture import (
    build_meta,
    expert_parameters,
    experts_modules,
    top_k,
)
from tierrun.engine.codecs.dense import CODECS, DTYPE_NAMES
from tierrun.io.errors import ModelError
from tierrun.io.extent import PAGE, Extent, align_up
from tierrun.io.store import Layer, Manifest, Matrix, Record, RecordClass, Resident
from tierrun.tools.layout import MATRIX_ALIGNMENT


def sketch(config: PreTrainedConfig, name: str) -> Manifest:
    """The manifest of `config`'s model called `name`, its weights as numbers of its own dtype.

    Raises:
        CheckpointError: a dense model.
        ModelError: transformers cannot build it, or tierrun cannot stream its experts.
    """
    model = build_meta(config, dtype=dtype_of(config))
    classes: list[RecordClass] = []
    layers: list[Layer] = []
    inside: set[str] = set()
    for path, module in experts_modules(model).items():
        parameters = expert_parameters(module)
        transposed = bool(getattr(module, "is_transposed", False))
        found = _class(parameters, transposed)
        if found not in classes:
            classes.append(found)
        count = next(iter(parameters.values())).shape[0]
        records = tuple(Record(0, 0, 0) for _ in range(count))
        layers.append(Layer(path, top_k(model, path), classes.index(found), records))
        inside |= {f"{path}.{parameter}" for parameter in parameters}
    residents = tuple(_residents(model, inside))
    kind = str(model.config.model_type)
    return Manifest("", name, kind, "", tuple(classes), tuple(layers), residents, ())


def dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """In which a checkpoint of `config` is published: what it says, else bf16."""
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return dtype if dtype in CODECS else torch.bfloat16


def arrange(matrices: Iterable[tuple[str, str, tuple[int, ...], int]]) -> RecordClass:
    """The class of records that hold matrices (name, codec, shape, bytes), as they are laid out."""
    placed, offset = [], 0
    for name, codec, shape, nbytes in matrices:
        extent = Extent(align_up(offset, MATRIX_ALIGNMENT), nbytes)
        placed.append(Matrix(name, codec, shape, extent))
        offset = extent.end
    return RecordClass(align_up(offset, PAGE), tuple(placed))


def _class(parameters: dict[str, torch.Tensor], transposed: bool) -> RecordClass:
    def matrices() -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        for name, tensor in parameters.items():
            shape = tuple(tensor.shape[1:])
            if transposed and len(shape) == 2:
                shape = (shape[1], shape[0])
            if tensor.dtype not in CODECS:
                raise ModelError(f"experts of {tensor.dtype} cannot be stored")
            yield name, CODECS[tensor.dtype], shape, prod(shape) * tensor.dtype.itemsize

    return arrange(matrices())


def _residents(model: PreTrainedModel, inside: set[str]) -> Iterator[Resident]:
    """Every weight and persistent buffer outside the experts; what is tied, once."""
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name in inside or name in tied:
            continue
        extent = Extent(0, tensor.numel() * tensor.dtype.itemsize)
        yield Resident(name, 0, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), extent, 0)
