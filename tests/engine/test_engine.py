"""An engine comes up whole or not at all, and goes without a trace."""

import gc
import logging
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from tests.engine.conftest import PROMPT, Model

import tierrun
from tierrun.engine import session
from tierrun.engine.engine import Engine
from tierrun.engine.options import Options
from tierrun.io.errors import BudgetError, StoreError, UsageError


def test_close_gives_all_memory_back(model: Model) -> None:
    """The engine, its slabs, its model; the threads are watched by every test."""
    engine = tierrun.load(model.store, ram="1GiB")
    list(engine.generate(PROMPT, 2))
    placement = engine.residency.placement
    parts = [engine, engine.model, engine.hook, placement.warm.slab, placement.hot.slab]
    watched = [weakref.ref(part) for part in parts]
    engine.close()
    del engine, placement, parts
    gc.collect()
    assert [ref() for ref in watched] == [None] * 5


def test_a_closed_engine_has_let_go_although_it_is_still_held(model: Model) -> None:
    engine = tierrun.load(model.store, ram="1GiB")
    list(engine.generate(PROMPT, 2))
    slab, network = (
        weakref.ref(engine.residency.placement.warm.slab),
        weakref.ref(engine.model),
    )
    engine.close()
    gc.collect()
    assert slab() is None and network() is None
    engine.close()


def test_leaving_the_block_closes_also_after_an_error(model: Model) -> None:
    with pytest.raises(ZeroDivisionError):
        with tierrun.load(model.store, ram="1GiB") as engine:
            next(engine.generate(PROMPT, 5))
            raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="closed"):
        engine.queue.submit([])


def test_an_answer_given_up_halfway_leaves_nothing_behind(model: Model) -> None:
    with tierrun.load(model.store, ram=str(model.smallest)) as engine:
        answer = engine.generate(PROMPT, 20, ignore_eos=True)
        next(answer)
        answer.close()
        engine.residency.check_integrity()


def test_two_engines_of_one_store_do_not_disturb_each_other(model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as first:
        alone = first.logits(PROMPT)
        with tierrun.load(model.store, ram=str(model.smallest)) as second:
            assert (second.logits(PROMPT) == alone).all()
            assert (first.logits(PROMPT) == alone).all()
        assert (first.logits(PROMPT) == alone).all()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"policy": "belady"}, "--policy belady"),
        ({"io": "io_uring"}, "--io io_uring"),
        ({"ram": "lots"}, "'lots'"),
        ({"context": 10**9}, "-c/--ctx-size"),
        ({"ubatch": -1}, "--ubatch-size -1"),
        ({"depth": 0}, "--depth 0"),
        ({"threads": -1}, "--threads -1"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_a_wrong_option_is_refused_by_its_flag_and_leaves_no_thread(
    options: dict[str, object], complaint: str, model: Model
) -> None:
    with pytest.raises(UsageError, match=complaint):
        tierrun.load(model.store, **{"ram": "1GiB"} | options)


@pytest.mark.parametrize(
    ("options", "flag"), [({"ram": "1"}, "--ram"), ({"ram": "0", "vram": "1"}, "--vram")]
)
def test_a_budget_too_small_names_its_flag_and_what_works(
    options: dict[str, str], flag: str, model: Model
) -> None:
    with pytest.raises(BudgetError, match=f"{flag}: .*works is {model.smallest} bytes"):
        tierrun.load(model.store, **options)
    for name in options.keys() & {flag.lstrip("-")}:
        tierrun.load(model.store, **options | {name: str(model.smallest)}).close()


def test_no_store_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        tierrun.load(tmp_path)


def test_an_engine_says_which_reader_it_uses_and_why(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "tierrun"):
        with tierrun.load(model.store, ram="1GiB", io="mmap") as engine:
            assert engine.stats().reader == "mmap"
    assert "reads: mmap (as asked)" in caplog.text


def test_a_fallback_is_said_aloud(
    own_store: Path, memory_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = memory_directory / "store"
    shutil.copytree(own_store, target)
    with tierrun.load(target, ram="1GiB") as engine:
        assert engine.stats().reader == "buffered"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert any("reads: buffered" in record.getMessage() for record in warnings)
    with pytest.raises(UsageError, match="tmpfs"):
        tierrun.load(target, ram="1GiB", io="direct", strict=True)


def test_stats_tell_sizes_and_totals(model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB", vram=str(model.smallest)) as engine:
        list(engine.generate(PROMPT, 4, ignore_eos=True))
        stats = engine.stats()
    assert 0 < stats.hot_bytes <= model.smallest
    assert model.expert_bytes <= stats.warm_bytes < 1 << 30
    assert stats.counters.hot > 0 and stats.counters.cold > 0
    assert stats.mean_depth >= 1


def test_options_have_the_defaults_of_the_design() -> None:
    options = Options()
    assert (options.ram, options.vram, options.io) == ("auto", "auto", "auto")
    assert (options.policy, options.lookahead, options.strict) == ("rates", True, False)


def test_on_the_cpu_prompts_go_in_chunks_of_512_unless_asked(model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        assert engine.backend.chunk == 512
    with tierrun.load(model.store, ram="1GiB", ubatch=3) as engine:
        assert engine.backend.chunk == 3


def test_all_logits_at_once_are_bounded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that memory allows for a prompt may have more logits than memory holds."""
    with tierrun.load(model.store, ram="1GiB") as engine:
        wanted, tokens = engine.logits(PROMPT), list[int]()
        monkeypatch.setattr(session, "_LOGITS", 20 * wanted.shape[1])
        monkeypatch.setattr(session, "_FEW", 1)
        monkeypatch.setattr(engine.hook, "end_forward", tokens.append)
        assert torch.allclose(engine.logits(PROMPT), wanted, atol=1e-3)
        engine.session().prefill(PROMPT)
    assert tokens == [20, 20, 40]


def test_an_engine_is_what_load_gives(model: Model) -> None:
    with tierrun.load([str(model.store)], ram="1GiB") as engine:
        assert isinstance(engine, Engine) and isinstance(engine, tierrun.Engine)
