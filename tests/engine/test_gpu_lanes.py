"""The CPU computes some of what VRAM lacks: the same numbers, wherever an expert was computed."""

import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from tests.engine.conftest import Model, convert
from tests.engine.models import save_runnable
from tests.engine.test_gpu_engine import load

from tierrun.bench.gpu_lanes import Misses
from tierrun.engine.experts import Interrupted
from tierrun.engine.gpu import backend
from tierrun.engine.options import Options
from tierrun.io.errors import UsageError
from tierrun.tiers.ledger import Counters

PROMPTS = [5, 9], [9, 7], [5, 7]
"""Read from the store, and then in RAM: VRAM holds half of the experts."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One layer and few tokens: interpreted kernels are slow."""
    directory = tmp_path_factory.mktemp("lanes")
    save_runnable("qwen3_moe", directory / "checkpoint", num_hidden_layers=1, vocab_size=48)
    return convert("qwen3_moe", directory / "checkpoint", directory / "store")


class Outcome(NamedTuple):
    """Logits of two tokens, what they cost, and what was said."""

    logits: torch.Tensor
    counters: Counters
    said: list[str]


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def outcome(tiny: Model) -> Callable[[str], Outcome]:
    """--lanes → what an engine gives with as little VRAM as works; its books are checked."""

    @cache
    def make(lanes: str) -> Outcome:
        kept, logger = _Kept(), logging.getLogger("tierrun")
        level = logger.level
        logger.addHandler(kept)
        logger.setLevel(logging.INFO)
        try:
            with load(tiny, vram=str(tiny.smallest), lanes=lanes, ubatch=2) as engine:
                logits = torch.cat([engine.logits(prompt) for prompt in PROMPTS])
                engine.check_integrity()
                assert not engine.backend.damaged()
                counters = engine.ledger.snapshot()
        finally:
            logger.removeHandler(kept)
            logger.setLevel(level)
        return Outcome(logits, counters, kept.messages)

    return make


@pytest.mark.parametrize("lanes", ["cpu", "auto"])
def test_either_lane_gives_the_same_logits_nearly(
    lanes: str, outcome: Callable[[str], Outcome]
) -> None:
    found, wanted = outcome(lanes), outcome("gpu")
    errors = (found.logits - wanted.logits).norm(dim=1) / wanted.logits.norm(dim=1)
    assert errors.max() < 1e-3
    assert wanted.counters.computed_bytes == 0 and wanted.counters.zero_copy_bytes > 0


def test_the_cpu_computes_what_ram_has_and_the_gpu_what_has_just_come(
    outcome: Callable[[str], Outcome],
) -> None:
    counters = outcome("cpu").counters
    assert counters.computed_bytes > 0 and counters.computed_seconds > 0
    assert counters.warm + counters.cold > 0
    assert counters.computed_bytes * counters.cold == counters.zero_copy_bytes * counters.warm


@pytest.mark.parametrize("lanes", ["gpu", "cpu"])
def test_ram_that_the_gpu_cannot_read_gives_the_same(
    lanes: str,
    tiny: Model,
    outcome: Callable[[str], Outcome],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make = backend.make_device_tiers
    monkeypatch.setattr(
        backend, "make_device_tiers", lambda *a, **k: make(*a, **k)._replace(in_place=False)
    )
    with load(tiny, vram=str(tiny.smallest), lanes=lanes, ubatch=2) as engine:
        logits = torch.cat([engine.logits(prompt) for prompt in PROMPTS])
        engine.check_integrity()
        counters = engine.ledger.snapshot()
    wanted = outcome("gpu").logits
    assert ((logits - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-3
    assert counters.zero_copy_bytes == 0 and counters.promoted_bytes > 0
    assert (counters.computed_bytes > 0) == (lanes == "cpu")
    assert "cannot read RAM in place" in caplog.text


def test_the_costs_are_said(outcome: Callable[[str], Outcome]) -> None:
    said = [message for message in outcome("auto").said if message.startswith("lanes:")]
    assert len(said) == 2 and all("GB/s" in one and "the GPU" in one for one in said)


def test_nothing_is_left_for_the_cpu_where_there_is_no_choice(tiny: Model) -> None:
    with load(tiny, vram="1GiB", lanes="auto", ubatch=2) as engine:
        assert engine.backend.hook.lanes is None, "VRAM holds all"
    with load(tiny, vram=str(tiny.smallest), lanes="auto", exact=True, ubatch=2) as engine:
        assert engine.backend.hook.lanes is None, "the CPU's bits differ"


def test_a_forward_pass_broken_off_leaves_the_lane_idle(tiny: Model) -> None:
    with load(tiny, vram=str(tiny.smallest), lanes="cpu", ubatch=2) as engine:
        session = engine.session()
        engine.hook.interrupted = True
        with pytest.raises(Interrupted):
            session.prefill([1])
        engine.hook.interrupted = False
        assert torch.isfinite(session.prefill([1])).all()
        engine.check_integrity()


def test_a_closed_engine_has_no_threads_whoever_keeps_its_lane(tiny: Model) -> None:
    with load(tiny, vram=str(tiny.smallest), lanes="cpu", ubatch=2) as engine:
        kept = engine.backend._host
        assert kept is not None
    assert not [one for one in threading.enumerate() if one.name.startswith("tierrun-cpu")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": "copy"}, "--lanes copy: choose auto, gpu, cpu"),
        ({"lanes": "cpu", "exact": True}, "--exact and --lanes cpu exclude each other"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**options)  # type: ignore[arg-type]


def test_the_bench_finds_every_expert_in_ram(tiny: Model) -> None:
    with load(tiny, vram=str(tiny.smallest), lanes="auto", ubatch=2) as engine:
        Misses.bring(engine)
        homes = engine.backend.residency.placement.homes
        assert len(homes) == len(engine.store.manifest.layers[0].records)
        assert engine.backend.vram.addresses.all()
        engine.check_integrity()
