"""Activations are recognised by their numbers, for every family that has one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.checkpoints import reference
from tests.engine.conftest import Model

from tierrun.engine.architecture import experts_modules
from tierrun.engine.gpu.activations import apply_gate, recognise

KINDS = {
    "qwen3_moe": ("silu", False),
    "mixtral": ("silu", False),
    "gemma4_text": ("gelu_tanh", False),
    "gpt_oss": ("gpt_oss", True),
}


@pytest.mark.parametrize("family", KINDS)
def test_known_kinds(family: str, model_of: Callable[[str], Model]) -> None:
    model = reference(model_of(family).checkpoint)
    module: Any = next(iter(experts_modules(model).values()))
    gate = recognise(module, 24)
    assert gate is not None and (gate.kind, gate.interleaved) == KINDS[family]
    both = torch.randn(7, 48)
    assert torch.allclose(apply_gate(gate, both), module._apply_gate(both), atol=1e-5)


class Odd(torch.nn.Module):
    has_gate = True

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        return both[:, ::2].relu() * both[:, 1::2]


def test_an_unknown_kind_is_left_to_the_module() -> None:
    assert recognise(Odd(), 16) is None
    odd = Odd()
    odd.has_gate = False
    assert recognise(odd, 16) is None
