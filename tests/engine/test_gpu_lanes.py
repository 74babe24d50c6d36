"""The CPU computes some of what VRAM lacks: the same numbers, wherever an expert was computed."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.engine.conftest import PROMPT, Model
from tests.engine.test_gpu_engine import DECODE, PREFILL, GpuEngine, load, outcome

from tierrun.engine.engine import Engine
from tierrun.engine.options import Options
from tierrun.io.errors import UsageError

FAMILY = "qwen3_moe"


@pytest.fixture
def tiny(model_of: Callable[[str], Model]) -> Model:
    return model_of(FAMILY)


def decoded(engine: Engine) -> torch.Tensor:
    """Logits of several tokens at once, few enough for decode, and of single ones after them."""
    session = engine.session()
    first = session.logits(PROMPT[:4])
    steps = [session.prefill([token]) for token in PROMPT[4 : 4 + DECODE]]
    return torch.cat([first, torch.stack(steps)])


def with_lanes(model: Model, lanes: str) -> Iterator[GpuEngine]:
    with load(model, vram=str(model.smallest), lanes=lanes) as engine:
        yield engine
        engine.check_integrity()
        assert not engine.backend.damaged()


def test_either_lane_gives_the_same_logits_nearly(tiny: Model) -> None:
    found, computed = {}, {}
    for lanes in ("copy", "cpu", "auto"):
        for engine in with_lanes(tiny, lanes):
            found[lanes] = decoded(engine)
            computed[lanes] = engine.ledger.snapshot().computed_bytes
    assert computed["copy"] == 0 and computed["cpu"] > 0
    for lanes in ("cpu", "auto"):
        errors = (found[lanes] - found["copy"]).norm(dim=1) / found["copy"].norm(dim=1)
        assert errors.median() < 1e-4


def test_the_cpu_alone_copies_only_what_is_worth_it(tiny: Model) -> None:
    for engine in with_lanes(tiny, "cpu"):
        decoded(engine)
        counters = engine.ledger.snapshot()
        assert counters.warm + counters.cold > 0
        assert counters.computed_bytes >= counters.promoted_bytes
        assert engine.hook.lanes.cpu.seconds(1 << 20) > 0


def test_a_prompt_goes_on_being_streamed(tiny: Model) -> None:
    for engine in with_lanes(tiny, "cpu"):
        assert torch.isfinite(outcome(engine)).all()
        assert engine.ledger.snapshot().promoted_bytes > 0


def test_nothing_is_left_for_the_cpu_where_vram_holds_all(tiny: Model) -> None:
    with load(tiny, vram="1GiB") as engine:
        assert engine.hook.lanes is None
    with load(tiny, vram=str(tiny.smallest), exact=True) as engine:
        assert engine.hook.lanes is None


def test_the_costs_are_said(tiny: Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tierrun")
    for engine in with_lanes(tiny, "auto"):
        decoded(engine)
    said = [message for message in caplog.messages if message.startswith("lanes:")]
    assert len(said) == 2 and "GB/s" in said[0] and "copies" in said[1]


def test_a_forward_pass_broken_off_leaves_the_lane_idle(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in with_lanes(tiny, "cpu"):
        session = engine.session()
        session.prefill(PROMPT[:PREFILL])
        engine.hook.interrupted = True
        with pytest.raises(BaseException):
            session.prefill([1])
        engine.hook.interrupted = False
        assert torch.isfinite(engine.logits(PROMPT[:3])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": "gpu"}, "--lanes gpu: choose auto, copy, cpu"),
        ({"lanes": "cpu", "exact": True}, "--exact and --lanes cpu exclude each other"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**options)  # type: ignore[arg-type]
