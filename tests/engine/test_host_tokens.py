"""Tokens in few compiled calls on the CPU: which modules, and that nothing else changes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.checkpoints import quiet
from tests.engine.conftest import Model
from tests.engine.models import save_runnable
from tests.engine.quick import fed, opened
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

import tierrun
from tierrun.engine.cores import physical_cores
from tierrun.engine.engine import Engine
from tierrun.engine.host import tokens
from tierrun.engine.host.attention import QuickAttention
from tierrun.engine.host.cache import GrowingLayer, let_grow
from tierrun.engine.host.experts import compute_seconds
from tierrun.engine.host.linears import QuickLinear
from tierrun.engine.host.norms import QuickNorm, quicken_norms
from tierrun.engine.host.routers import QuickRouter
from tierrun.engine.host.threads import TorchThreads
from tierrun.engine.kernels.token_experts import TokenExperts
from tierrun.engine.kernels.workers import Workers

UNUSUAL = (
    *("qwen3_next", "qwen3_5_moe_text", "kimi_linear", "bailing_hybrid", "granitemoehybrid"),
    *("jamba", "minimax", "gpt_oss", "deepseek_v3", "granitemoe", "mixtral"),
)


def count(engine: Engine, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in engine.model.modules())


def test_what_is_recognised_is_computed_so_and_not_with_exact(packed: Path) -> None:
    with opened(packed) as quick, opened(packed, exact=True) as exact:
        layers = len(quick.store.manifest.layers)
        for kind, wanted in ((QuickAttention, layers), (QuickRouter, layers), (QuickLinear, 1)):
            assert count(quick, kind) >= wanted and count(exact, kind) == 0
        assert count(quick, QuickNorm) > 2 * layers and count(exact, QuickNorm) == 0
        near, wanted_logits = fed(quick), fed(exact)
        assert not torch.equal(near, wanted_logits)
        assert (near - wanted_logits).norm() < 0.1 * wanted_logits.norm()


def test_stores_without_packed_weights_are_none_of_it(packed: Path, model: Model) -> None:
    with opened(model.store) as plain:
        assert count(plain, QuickNorm) == count(plain, QuickRouter) == 0
    norm = nn.RMSNorm(16, eps=1e-6).requires_grad_(False)
    prompt, token = torch.randn(1, 7, 16), torch.randn(1, 1, 16)
    wanted = norm(prompt), norm(token)
    assert quicken_norms(norm, Workers(2)) == 1
    torch.testing.assert_close(norm(prompt), wanted[0])
    torch.testing.assert_close(norm(token), wanted[1])


@pytest.mark.parametrize("family", UNUSUAL)
def test_packed_stores_of_unusual_families_run(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their norms or queries may be gated, their layers recurrent: such parts stay as they are."""
    save_runnable(family, tmp_path / "checkpoint")
    with quiet():
        tierrun.convert(
            tmp_path / "checkpoint", tmp_path / "store", quant="q8_0", quant_resident="q8_0"
        )
    with opened(tmp_path / "store") as engine:
        found = fed(engine)
    monkeypatch.setattr(tokens, "quicken", lambda *_: False)
    with opened(tmp_path / "store") as engine:
        wanted = fed(engine)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each layer that wanted it, whether a token's experts were computed without a lease."""
    found: list[bool] = []
    plain = TokenExperts.begin

    def begin(self: TokenExperts, hidden: int, top_k: int) -> bool:
        found.append(plain(self, hidden, top_k))
        return found[-1]

    monkeypatch.setattr(TokenExperts, "begin", begin)
    yield found


def test_logits_and_books_do_not_depend_on_the_way_of_a_token(
    packed: Path, begun: list[bool]
) -> None:
    with opened(packed) as roomy:
        fed(roomy)
        before, usage = roomy.ledger.snapshot(), [row.clone() for row in roomy.hook.usage]
        begun.clear()
        wanted = fed(roomy)
        counters, layers = roomy.ledger.snapshot() - before, len(roomy.store.manifest.layers)
        assert begun and all(begun) and counters.warm == counters.lookups
        assert all(torch.equal(2 * x, y) for x, y in zip(usage, roomy.hook.usage, strict=True))
        timings = list(roomy.ledger.timings)[-layers - 1 :]
        assert [timing.layer for timing in timings] == list(range(layers + 1))
        assert all(timing.hits > 0 and timing.resident > 0 for timing in timings[:-1])
        roomy.check_integrity()
    small = {"ram": str(128 << 10)}
    for options in (small, small | {"lookahead": False}, {"vram": "64KiB"}, {"threads": 2}):
        with opened(packed, **options) as engine:
            fed(engine)
            before = engine.ledger.snapshot()
            assert torch.equal(fed(engine), wanted), options
            assert (engine.ledger.snapshot() - before).lookups == counters.lookups
            assert all(torch.equal(2 * x, y) for x, y in zip(usage, engine.hook.usage, strict=True))
            engine.check_integrity()


def test_a_cache_grows_to_what_transformers_own_holds() -> None:
    theirs, ours = DynamicCache(), DynamicCache()
    for length in (3, 1, 1, 300, 1, 700):
        states = torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
        wanted = theirs.update(*states, 0)
        found = ours.update(*states, 0)
        assert all(map(torch.equal, wanted, found))
        assert ours.get_seq_length() == theirs.get_seq_length()
        let_grow(ours)
        assert type(ours.layers[0]) is GrowingLayer and type(theirs.layers[0]) is DynamicLayer
        assert ours.layers[0].get_mask_sizes(2) == theirs.layers[0].get_mask_sizes(2)


class _Other(nn.Module):
    """Called a norm, but it is none of root mean squares."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight


class OtherNorm(_Other):
    """Its name is looked at first."""


def test_what_is_not_recognised_stays_as_it_is() -> None:
    norm = OtherNorm()
    assert quicken_norms(norm, Workers(1)) == 0 and type(norm) is OtherNorm


def test_torch_has_one_thread_where_kernels_compute() -> None:
    before = torch.get_num_threads()
    try:
        for quick, tokens, wanted in ((True, 1, 1), (True, 9, 2), (False, 1, 2)):
            TorchThreads(2, quick=quick).before(tokens)
            assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


def test_there_is_a_core_to_run_on() -> None:
    assert physical_cores() >= 1


def test_seconds_of_compute_are_those_of_all_threads() -> None:
    assert compute_seconds(3.0, 0.0, False, 4) == 3.0
    assert compute_seconds(3.0, 2.0, True, 2) == 2.0  # one second of one thread, three of another
    assert compute_seconds(3.0, 2.0, False, 2) == 1.0  # nobody knows when the other ended
    assert compute_seconds(3.0, 2.0, True, 1) == 1.0
