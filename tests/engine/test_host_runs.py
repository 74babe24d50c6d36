"""Layers of a token in one compiled call: the same as one by one, and undone where it was wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.quick import TOKENS, fed, opened
from torch import nn

from tierrun.engine.engine import Engine
from tierrun.engine.host.layers import QuickLayer
from tierrun.engine.host.run import LayerRun
from tierrun.engine.kernels.token_experts import TokenExperts
from tierrun.engine.kernels.token_run import Stop, TokenRun
from tierrun.io.errors import CorruptError
from tierrun.io.store import ExpertKey


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


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether some experts of a token were computed, for each call for those that are there."""
    found: list[bool] = []
    plain = TokenExperts.begin_some

    def begin_some(self: TokenExperts, hidden: int, top_k: int) -> bool:
        found.append(plain(self, hidden, top_k))
        return found[-1]

    monkeypatch.setattr(TokenExperts, "begin_some", begin_some)
    return found


def test_where_some_must_be_read_those_that_are_there_are_computed_meanwhile(
    packed: Path, begun: list[bool]
) -> None:
    with opened(packed) as engine:
        wanted = [fed(engine) for _ in range(2)][-1]
        assert True in begun, "of each layer's first tokens"
        begun.clear()
        assert torch.equal(fed(engine), wanted)
        assert not begun, "all are there"
    with opened(packed, ram=str(128 << 10)) as engine:
        assert torch.equal(fed(engine), wanted)
        assert {True, False} == set(begun)
        engine.check_integrity()


def test_a_read_that_fails_beside_the_others_leaves_nothing_claimed(
    packed: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(packed, tmp_path / "own", ignore=shutil.ignore_patterns("usage.*"))
    with opened(own) as engine:
        fed(engine)
        expert = int(engine.hook.usage[2].argmax())
        record, extent = engine.store.locate(ExpertKey(2, expert))
        path = engine.store.shard_paths[record.shard]
    with path.open("r+b") as shard:
        shard.seek(extent.offset + 64)
        shard.write(b"\xff" * 64)
    with opened(own, ram=str(128 << 10)) as engine:
        for _ in range(2):
            with pytest.raises(CorruptError, match=f"layer 2, expert {expert} "):
                fed(engine)
            engine.check_integrity()
