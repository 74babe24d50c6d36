"""The fused router, and which modules it replaces."""

from collections.abc import Callable

import pytest
import torch
from tests.checkpoints import reference
from tests.engine.conftest import Model

from tierrun.engine.gpu.routers import fuse_routers
from tierrun.engine.kernels.route import choose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "count"), [(1, 8, 2), (3, 60, 4), (8, 256, 8)])
def test_the_largest_are_chosen(tokens: int, experts: int, count: int, renormalise: bool) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts)) * 3
    wanted, places = logits.double().softmax(-1).topk(count)
    if renormalise:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    scores, indices = choose(logits.to(DEVICE), count, renormalise)
    assert torch.equal(indices.cpu(), places)
    assert (scores.cpu() - wanted).abs().max() < 1e-6


def test_equal_ones_are_taken_in_order() -> None:
    _, indices = choose(torch.zeros(1, 16, device=DEVICE), 3, True)
    assert indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("family", "fused"), [("qwen3_moe", 4), ("olmoe", 4), ("deepseek_v3", 0)])
def test_plain_routers_are_replaced(
    family: str, fused: int, model_of: Callable[[str], Model]
) -> None:
    model = reference(model_of(family).checkpoint).to(DEVICE)
    tokens = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    with torch.no_grad():
        wanted = model(tokens).logits
        assert fuse_routers(model) == fused
        assert (model(tokens).logits - wanted).abs().max() < 1e-4
