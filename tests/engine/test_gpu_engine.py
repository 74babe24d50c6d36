"""The whole GPU engine: on a GPU where there is one, else small, with interpreted kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.conftest import PROMPT, Model

import tierrun
from tierrun.engine.engine import Engine
from tierrun.engine.gpu.backend import GpuBackend
from tierrun.engine.options import Options
from tierrun.io.store import Store

CUDA = torch.cuda.is_available()
PREFILL, DECODE = (40, 24) if CUDA else (9, 2)
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next") if CUDA else ("gpt_oss",)
TYPICAL, TOLERANCE, TURNED = 5e-3, 2e-2, 0.15
"""Relative errors of a position: of most, of all but a share at which a router's tie turned."""


class GpuEngine(Engine):
    """On the CPU where there is no GPU: kernels are interpreted, copies immediate."""

    def _make_backend(self, weights: Any) -> GpuBackend:
        device = torch.device("cuda" if CUDA else "cpu")
        return GpuBackend(self.store, weights, self.options, self.ledger, device, 64)


def load(model: Model, **options: Any) -> GpuEngine:
    return GpuEngine(Store.open([model.store]), Options(ram="1GiB", device="cpu", **options))


def outcome(engine: Engine) -> torch.Tensor:
    """Logits of a prompt and of single tokens after it."""
    session = engine.session()
    prompt = session.logits(PROMPT[:PREFILL])
    steps = [session.prefill([token]) for token in PROMPT[:DECODE]]
    return torch.cat([prompt, torch.stack(steps)])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_cpu_engines(family: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(family)
    with tierrun.load(model.store, ram="1GiB", device="cpu") as engine:
        wanted = outcome(engine)
    most = model.expert_bytes
    with load(model, vram=str(most // 2), exact=True) as engine:
        found = outcome(engine)
        engine.check_integrity()
        counters = engine.stats().counters
        assert counters.hot and counters.cold
        assert engine.stats().hot_bytes <= most // 2
    errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.median() <= TYPICAL
    assert (errors > TOLERANCE).float().mean() <= TURNED


def test_any_budget_gives_the_same_bits(model_of: Callable[[str], Model]) -> None:
    model = model_of(FAMILIES[0])
    found = []
    for vram in (model.smallest, model.expert_bytes):
        with load(model, vram=str(vram), exact=True) as engine:
            found.append(outcome(engine))
            engine.check_integrity()
    assert torch.equal(*found)


def test_sessions_take_turns(model_of: Callable[[str], Model]) -> None:
    """One cache on the device: a session that comes back computes its past again."""
    with load(model_of(FAMILIES[0]), vram="1GiB", exact=True) as engine:
        first, second = engine.session(), engine.session()
        first.prefill(PROMPT[:9])
        wanted = first.prefill([5])
        first.reset()
        first.prefill(PROMPT[:9])
        second.prefill([7, 8])
        assert torch.allclose(first.prefill([5]), wanted, atol=1e-4)
