"""Resident weights on the device: each its own, tied ones once."""

from typing import Any

import torch
from torch import nn

from tierrun.engine.codecs.weight import widened
from tierrun.engine.gpu.weights import to_device
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.stored import store_back

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(weights: list[torch.Tensor], device: torch.device) -> list[Any]:
    """Linear modules over `weights`, on `device`."""
    model: Any = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in weights)
    for module, stored in zip(model, weights, strict=True):
        store_back(module, stored, CpuKernels())
    to_device(model, device)
    return list(model)


def test_weights_of_a_dtype_without_a_codec_are_not_mixed_up() -> None:
    """They are widened on the way, into memory that the next one is given when they have gone."""
    weights = [torch.randn(64, 64, dtype=torch.float64) for _ in range(6)]
    modules = moved(weights, torch.device("meta"))  # nothing of what was widened is kept
    assert len({id(module.stored) for module in modules}) == len(weights)


def test_products_are_those_of_the_stored_weights() -> None:
    weights = [torch.randn(64, 64, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(3, 64)
    for module, stored in zip(moved(weights, DEVICE), weights, strict=True):
        assert (module(x.to(DEVICE)).cpu() - x @ widened(stored).T).abs().max() < 1e-3


def test_tied_weights_are_uploaded_once() -> None:
    tied = torch.randn(64, 64).to(torch.bfloat16)
    one, other = moved([tied, tied], DEVICE)
    assert one.stored is other.stored
