"""Stored linear modules of a token in one compiled call."""

import torch
from torch import nn

from tierrun.engine.codecs.packed import Packed
from tierrun.engine.host.classes import become
from tierrun.engine.kernels.int8_linear import Int8Linear
from tierrun.engine.kernels.token_products import TokenProducts
from tierrun.engine.kernels.workers import Workers
from tierrun.engine.stored import StoredLinear


class QuickLinear(nn.Module):
    """A stored linear module whose tokens `quick` multiplies."""

    quick: TokenProducts

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        if input.numel() != self.quick.columns or not input.is_contiguous():
            y: torch.Tensor = super().forward(input)
            return y
        return self.quick(input).view(*input.shape[:-1], self.quick.rows)


def quicken_linears(model: nn.Module, kernels: Int8Linear, workers: Workers) -> tuple[int, int]:
    """Let the stored linear modules of `model` compute tokens so; how many do, and how many
    cannot."""
    found = [module for module in model.modules() if isinstance(module, StoredLinear)]
    taken = [module for module in found if takes(module, kernels)]
    for module in taken:
        become(module, QuickLinear, quick=TokenProducts([module.stored], [module.bias], workers))
    return len(taken), len(found) - len(taken)


def takes(module: nn.Module, kernels: Int8Linear) -> bool:
    """Whether `module` is a linear one, no more than that, that int8 kernels can multiply."""
    return (
        type(module) is StoredLinear
        and isinstance(module.stored, Packed)
        and module.stored.inputs is None
        and kernels.takes(module.stored)
    )
