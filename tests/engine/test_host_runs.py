"""Layers of a token in one compiled call: the same as one by one, and undone where it was wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import quiet
from tests.engine.conftest import PROMPT, Model
from torch import nn

import tierrun
from tierrun.engine.engine import Engine
from tierrun.engine.host.layers import QuickLayer
from tierrun.engine.host.run import LayerRun
from tierrun.engine.kernels.token_run import Stop, TokenRun

TOKENS = PROMPT[:10]


@pytest.fixture(scope="module")
def packed(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that can be in Q8_0 is."""
    store = tmp_path_factory.mktemp("runs") / "store"
    with quiet():
        tierrun.convert(model.checkpoint, store, quant="q8_0", quant_resident="q8_0")
    return store


def opened(store: Path, **options: Any) -> Engine:
    return tierrun.load(store, **{"ram": "1GiB", "device": "cpu"} | options)


def fed(engine: Engine) -> torch.Tensor:
    """Logits after each token, one at a time; the experts that the first need are read."""
    session = engine.session()
    return torch.stack([session.prefill([token]) for token in TOKENS])


def layers_of(engine: Engine) -> list[QuickLayer]:
    return [module for module in engine.model.modules() if isinstance(module, QuickLayer)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, Stop]]:
    """First and last layer of each compiled call, and where it ended."""
    found: list[tuple[int, int, Stop]] = []
    plain = TokenRun.through

    def through(self: TokenRun, first: int, last: int, *rest: Any) -> Stop:
        stop = plain(self, first, last, *rest)
        found.append((first, last, stop))
        return stop

    monkeypatch.setattr(TokenRun, "through", through)
    return found


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have every layer computed in a call of its own."""

    def forget() -> None:
        plain = LayerRun._prepare

        def prepare(self: LayerRun, at: int, *rest: Any) -> int:
            self._linked = [False] * len(self._linked)
            return plain(self, at, *rest)

        monkeypatch.setattr(LayerRun, "_prepare", prepare)

    return forget


def test_a_token_whose_experts_are_there_is_one_call(
    packed: Path, calls: list[tuple[int, int, Stop]]
) -> None:
    with opened(packed, lookahead=False) as engine:  # it would read what is never used
        last = len(engine.store.manifest.layers) - 1
        assert len(layers_of(engine)) == last + 1
        fed(engine)
        calls.clear()
        fed(engine)
        assert [call[:2] for call in calls] == [(0, last)] * (len(TOKENS) - 1)  # 1: no cache yet
        engine.check_integrity()


@pytest.mark.parametrize("ram", ["1GiB", str(128 << 10)])
def test_together_or_apart_gives_the_same_bits(
    packed: Path, ram: str, calls: list[tuple[int, int, Stop]], apart: Callable[[], None]
) -> None:
    with opened(packed, ram=ram) as engine:
        together = [fed(engine) for _ in range(2)][-1]
        assert any(first < last for first, last, _ in calls)
        usage, figures = [row.clone() for row in engine.hook.usage], engine.ledger.snapshot()
        engine.check_integrity()
    calls.clear()
    apart()
    with opened(packed, ram=ram) as engine:
        assert torch.equal([fed(engine) for _ in range(2)][-1], together)
        assert calls and all(first == last for first, last, _ in calls)
        assert all(map(torch.equal, usage, engine.hook.usage))
        assert engine.ledger.snapshot().lookups == figures.lookups


class _Shifted(nn.Module):
    """Gives a layer something else than the one before it gave."""

    by = 0.0

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x + self.by if self.by else x, *args, **kwargs)


def test_what_was_computed_from_something_else_is_undone(packed: Path) -> None:
    """As by a model that at times adds to what is between two of its layers."""

    def logits(engine: Engine, learnt: bool) -> torch.Tensor:
        layer: Any = layers_of(engine)[1]
        layer.__class__ = type("Shifted", (_Shifted, type(layer)), {})
        if learnt:
            fed(engine)  # nothing is added: all layers are one run
        layer.by = 0.5
        found = fed(engine)
        layer.by = 0.0
        return torch.cat([found, fed(engine)])

    with opened(packed) as engine:
        wanted = logits(engine, learnt=False)
    with opened(packed) as engine:
        assert torch.equal(logits(engine, learnt=True), wanted)
        with_nothing_added = fed(engine)
    assert torch.equal(with_nothing_added, wanted[len(TOKENS) :])
