"""The whole GPU engine: on a GPU where there is one, else small, with interpreted kernels."""

from collections.abc import Callable
from functools import cache
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
COARSER = {"gpt_oss": 2.5}
"""Families of which bf16 keeps less, by so much: see bench/results/gpu_parity.json."""


class GpuEngine(Engine):
    """On the CPU where there is no GPU: kernels are interpreted, copies immediate."""

    backend: GpuBackend

    def _make_backend(self, weights: Any) -> GpuBackend:
        device = torch.device("cuda" if CUDA else "cpu")
        return GpuBackend(self.store, weights, self.options, self.ledger, device, 64)


def load(model: Model, **options: Any) -> GpuEngine:
    given = Options(ram="1GiB", device="cpu", **{"ubatch": PREFILL} | options)
    return GpuEngine(Store.open([model.store]), given)


def outcome(engine: Engine) -> torch.Tensor:
    """Logits of a prompt and of single tokens after it."""
    session = engine.session()
    prompt = session.logits(PROMPT[:PREFILL])
    steps = [session.prefill([token]) for token in PROMPT[:DECODE]]
    return torch.cat([prompt, torch.stack(steps)])


@pytest.fixture(scope="module")
def outcome_with(model_of: Callable[[str], Model]) -> Callable[[str, str], torch.Tensor]:
    """(family, --vram) → what an exact engine gives, with its books checked."""

    @cache
    def make(family: str, vram: str) -> torch.Tensor:
        with load(model_of(family), vram=vram, exact=True) as engine:
            found = outcome(engine)
            engine.check_integrity()
            assert not engine.backend.damaged()
            assert engine.stats().hot_bytes <= int(vram)
            assert engine.stats().counters.hot and engine.stats().counters.cold
        return found

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_cpu_engines(
    family: str,
    model_of: Callable[[str], Model],
    outcome_with: Callable[[str, str], torch.Tensor],
) -> None:
    model = model_of(family)
    with tierrun.load(model.store, ram="1GiB", device="cpu", exact=True) as engine:
        wanted = outcome(engine)
    found = outcome_with(family, str(model.expert_bytes // 2))
    errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    coarser = COARSER.get(family, 1.0)
    assert errors.median() <= coarser * TYPICAL
    assert (errors > coarser * TOLERANCE).float().mean() <= TURNED


@pytest.mark.parametrize("family", FAMILIES)
def test_any_budget_gives_the_same_bits(
    family: str,
    model_of: Callable[[str], Model],
    outcome_with: Callable[[str, str], torch.Tensor],
) -> None:
    model = model_of(family)
    half = outcome_with(family, str(model.expert_bytes // 2))
    assert torch.equal(outcome_with(family, str(model.smallest)), half)


def test_a_damaged_expert_in_vram_is_found(model_of: Callable[[str], Model]) -> None:
    with load(model_of(FAMILIES[0]), vram="1GiB") as engine:
        engine.warm_up()
        assert engine.backend.damaged() == []
        key, record = next(iter(engine.backend.vram.records()))
        record[-1] ^= 1
        assert engine.backend.damaged() == [key]


@pytest.mark.skipif(not CUDA, reason="no GPU on this machine")
def test_recorded_passes_give_the_bits_of_eager_ones(model_of: Callable[[str], Model]) -> None:
    model, found = model_of(FAMILIES[0]), []
    for graphs in (True, False):
        with load(model, vram=str(model.expert_bytes), exact=True, graphs=graphs) as engine:
            found.append(outcome(engine))
    assert torch.equal(*found)


@pytest.mark.skipif(not CUDA, reason="no GPU on this machine")
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
