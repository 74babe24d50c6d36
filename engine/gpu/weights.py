"""Resident weights on the device, in the codec they are stored in."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tierrun.engine.codecs.codec import Codec
from tierrun.engine.codecs.dense import CODECS
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.weight import Weight, widened
from tierrun.engine.gpu import ops
from tierrun.engine.kernels.geometry import Geometry, dense_geometry, packed_geometry
from tierrun.engine.placeholder import Placeholder
from tierrun.engine.stored import StoredEmbedding, StoredLinear


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """The matrix `shape` [out, in] as `data` (uint8 [bytes], on the device) in a codec or a dtype.

    `geometry` is its number among those that `tierrun.engine.gpu.ops` knows; `inputs` as in
    `Packed`. `host` is the same weight in the store's mapping.
    """

    host: Weight
    data: torch.Tensor
    geometry: int
    shape: torch.Size
    inputs: torch.Tensor | None


class GpuKernels:
    """What modules over stored weights compute with on the device; see `CpuKernels`."""

    def linear(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x` fp32 [n, in] times `weight` (a `DeviceWeight`), transposed: fp32 [n, out]."""
        x = x if weight.inputs is None else x[:, weight.inputs]
        y: torch.Tensor = ops.linear(x, weight.data, weight.geometry, bias)
        return y

    def embedding(self, ids: torch.Tensor, weight: Any) -> torch.Tensor:
        """The rows `ids` [n] of `weight` (a `DeviceWeight`), fp32 [n, in]."""
        found: torch.Tensor = ops.rows(ids, weight.data, weight.geometry)
        return found


def geometry_of(codec: Codec | torch.dtype, shape: tuple[int, ...]) -> Geometry:
    """How a matrix of `shape` lies in memory."""
    if isinstance(codec, torch.dtype):
        return dense_geometry(CODECS[codec], shape)
    return packed_geometry(codec, shape)


def to_device(model: PreTrainedModel, device: torch.device) -> int:
    """Move everything but the experts of a loaded `model` to `device`; bytes that were moved.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    shared: dict[tuple[int, torch.Size], DeviceWeight] = {}
    kernels = GpuKernels()
    moved = 0
    for module in model.modules():
        if isinstance(module, StoredLinear | StoredEmbedding):
            weight = _upload(module.stored, device, shared)
            module.stored, module.kernels = weight, kernels
            module.weight = Placeholder.of(weight.host, device)
        moved += _move_rest(module, device)
    return moved + sum(weight.data.nbytes for weight in shared.values())


def _move_rest(module: nn.Module, device: torch.device) -> int:
    """Parameters and buffers that `module` itself holds, other than experts and placeholders."""
    moved = 0
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not parameter.is_meta and not isinstance(parameter, Placeholder):
            values = nn.Parameter(parameter.data.to(device), requires_grad=False)
            module.register_parameter(name, values)
            moved += values.nbytes
    for name, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[name] = buffer.to(device)
        moved += buffer.nbytes
    return moved


def _upload(
    stored: Weight, device: torch.device, shared: dict[tuple[int, torch.Size], DeviceWeight]
) -> DeviceWeight:
    """`stored` on the device; tied weights, which lie in one place, once."""
    place = stored.data if isinstance(stored, Packed) else stored
    key = (place.data_ptr(), stored.shape)  # in the store's mapping, which outlives this
    if key not in shared:
        data, kind, inputs = _bytes_of(stored)
        number = ops.geometry_number(geometry_of(kind, tuple(stored.shape)))
        order = None if inputs is None else inputs.to(device)
        shared[key] = DeviceWeight(stored, data.to(device), number, stored.shape, order)
    return shared[key]


def _bytes_of(stored: Weight) -> tuple[torch.Tensor, Codec | torch.dtype, torch.Tensor | None]:
    """All bytes of `stored` as uint8, what they are in, and the order of the columns."""
    if isinstance(stored, Packed):
        return stored.data, stored.codec, stored.inputs
    if stored.dtype not in CODECS:
        stored = widened(stored)
    return stored.contiguous().view(-1).view(torch.uint8), stored.dtype, None
