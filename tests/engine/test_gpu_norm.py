"""The fused RMS norm, and which modules it replaces."""

import pytest
import torch
from torch import nn

from tierrun.engine.gpu.norms import fuse_norms
from tierrun.engine.kernels.norm import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Norm(nn.Module):
    """As architectures write it: `offset` is added to the weight."""

    def __init__(self, size: int, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.eps, self._offset = 1e-5, offset

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        scaled = hidden_states * torch.rsqrt(variance + self.eps)
        return scaled * (self.weight + self._offset)


@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (1, 2, 5, 16)])
def test_rows_are_normalised(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, device=DEVICE), torch.randn(shape[-1], device=DEVICE)
    wanted = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert (rms_norm(x, weight, 1e-6) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_of_both_kinds_are_replaced(offset: float) -> None:
    norm = Norm(48, offset).to(DEVICE).requires_grad_(False)
    x = torch.randn(4, 48, device=DEVICE)
    wanted = norm(x)
    assert fuse_norms(norm) == 1
    assert (norm(x) - wanted).abs().max() < 1e-5


def test_what_is_no_rms_norm_is_left_alone() -> None:
    for module in (nn.LayerNorm(32), Norm(32, 0.5), nn.Linear(8, 8)):
        before = vars(module).get("forward")
        assert fuse_norms(module.requires_grad_(False).to(DEVICE)) == 0
        assert vars(module).get("forward") is before
