"""Generation: one record per token, and an end for a reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.engine.bpe import VOCABULARY, save_tokenizer
from tests.engine.conftest import PROMPT, Model, convert
from tests.engine.models import save_runnable

import tierrun
from tierrun.engine.engine import Engine
from tierrun.engine.experts import Interrupted
from tierrun.engine.sampling import Sampling
from tierrun.engine.tokens import TokenRecord
from tierrun.io.errors import UsageError


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model with a tokenizer; its answers are noise, of letters, signs and broken bytes."""
    directory = tmp_path_factory.mktemp("talking")
    save_runnable("qwen3_moe", directory / "checkpoint", vocab_size=VOCABULARY)
    save_tokenizer(directory / "checkpoint")
    return convert("qwen3_moe", directory / "checkpoint", directory / "store")


def ids(records: list[TokenRecord]) -> list[int]:
    return [record.id for record in records]


def with_defaults(store: Path, **values: object) -> Path:
    """Change the generation config of a store."""
    path = store / "model" / "generation_config.json"
    document = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(document | values))
    return store


# -- one record per token -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7])
def test_there_is_exactly_one_record_per_token(count: int, model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        records = list(engine.generate(PROMPT, count, ignore_eos=True))
    assert len(records) == count
    assert [record.finish for record in records] == [None] * (count - 1) + ["length"] * bool(count)
    assert not any(record.text for record in records), "no tokenizer, no text"


def test_records_with_text_are_as_many_and_their_text_is_the_whole(talking: Model) -> None:
    """Tokens that complete no character have a record too, with empty text."""
    with tierrun.load(talking.store, ram="1GiB") as engine:
        assert engine.tokenizer is not None
        records = list(engine.generate("the answer", 48, ignore_eos=True))
        assert len(records) == 48
        whole = engine.tokenizer.decode(ids(records), skip_special_tokens=True)
        assert "".join(record.text for record in records) == whole
        assert ids(records) == ids(list(engine.generate(encode(engine), 48, ignore_eos=True)))


def encode(engine: Engine) -> list[int]:
    assert engine.tokenizer is not None
    tokens: list[int] = engine.tokenizer("the answer")["input_ids"]
    return tokens


def test_text_needs_a_tokenizer(model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        with pytest.raises(UsageError, match="no tokenizer"):
            list(engine.generate("text"))
        with pytest.raises(UsageError, match="no tokenizer"):
            list(engine.generate(PROMPT, stop=["."]))


@pytest.mark.parametrize("token", [-1, 256])
def test_a_token_outside_the_vocabulary_is_refused(token: int, model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        for call in (lambda: list(engine.generate([5, token])), lambda: engine.logits([token])):
            with pytest.raises(UsageError, match="0 … 255"):
                call()
        assert len(list(engine.generate(PROMPT, 1))) == 1


def test_an_empty_prompt_is_refused(model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        for call in (lambda: list(engine.generate([])), lambda: engine.logits([])):
            with pytest.raises(UsageError, match="empty prompt"):
                call()


# -- the end -----------------------------------------------------------------------------------


def test_an_end_token_ends_the_answer_and_has_its_record(model: Model, own_store: Path) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        free = ids(list(engine.generate(PROMPT, 12, ignore_eos=True)))
    end = free[5]
    assert end not in free[:5]
    with tierrun.load(with_defaults(own_store, eos_token_id=[end, 251]), ram="1GiB") as engine:
        assert engine.defaults.eos_tokens() == {end, 251}
        records = list(engine.generate(PROMPT, 12))
        assert ids(records) == free[:6]
        assert [record.finish for record in records] == [None] * 5 + ["stop"]
        assert ids(list(engine.generate(PROMPT, 12, ignore_eos=True))) == free


def test_a_stop_string_ends_the_answer_and_is_not_in_it(talking: Model) -> None:
    with tierrun.load(talking.store, ram="1GiB") as engine:
        whole = list(engine.generate("the answer", 48, ignore_eos=True))
        text = "".join(record.text for record in whole)
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        records = list(engine.generate("the answer", 48, ignore_eos=True, stop=[stop, "nowhere"]))
    assert "".join(record.text for record in records) == text[: text.index(stop)]
    assert len(records) < 48 and records[-1].finish == "stop"
    assert ids(records) == ids(whole)[: len(records)]


def test_fixed_tokens_are_taken_as_they_are(model: Model) -> None:
    """The same stream for every arm of a comparison, whatever the model would say."""
    fixed = [9, 9, 8, 200, 11]
    with tierrun.load(model.store, ram="1GiB") as engine:
        records = list(engine.generate(PROMPT, 100, fixed=fixed, ignore_eos=True))
        assert ids(records) == fixed and records[-1].finish == "length"
        assert ids(list(engine.generate(PROMPT, 3, fixed=fixed, ignore_eos=True))) == fixed[:3]


def test_the_context_ends_the_answer(model: Model) -> None:
    """The last token is chosen from the logits after a full context."""
    with tierrun.load(model.store, ram="1GiB", context=48) as engine:
        records = list(engine.generate(PROMPT, 100, ignore_eos=True))
        assert len(records) == 48 - 40 + 1
        assert records[-1].finish == "length"
        with pytest.raises(UsageError, match="49 tokens do not fit a context of 48.*--ctx-size"):
            list(engine.generate([*PROMPT, *range(9)], 1))
        full = list(engine.generate([*PROMPT, *range(3, 11)], 5, ignore_eos=True))
        assert len(full) == 1


def test_a_context_longer_than_the_models_is_refused(model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        longest = engine.context
    with pytest.raises(UsageError, match=f"ends at {longest}"):
        tierrun.load(model.store, ram="1GiB", context=longest + 1)


# -- sampling -----------------------------------------------------------------------------------


def test_a_seed_reproduces_an_answer(model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:

        def answer(seed: int) -> list[int]:
            sampling = Sampling(temperature=1.5, top_k=40, seed=seed)
            return ids(list(engine.generate(PROMPT, 16, sampling=sampling, ignore_eos=True)))

        assert answer(1) == answer(1) != answer(2)


def test_the_models_own_sampling_is_the_default(own_store: Path) -> None:
    store = with_defaults(own_store, do_sample=True, temperature=0.7, top_k=3)
    with tierrun.load(store, ram="1GiB") as engine:
        assert engine.defaults.sampling() == Sampling(0.7, 3)
        assert engine.defaults.sampling(top_k=0, seed=5) == Sampling(0.7, 0, seed=5)


# -- cost --------------------------------------------------------------------------------------


def test_figures_of_all_tokens_add_up_to_the_engines(model: Model) -> None:
    with tierrun.load(model.store, ram=str(model.smallest)) as engine:
        records = list(engine.generate(PROMPT, 8, ignore_eos=True))
        total = engine.stats().counters
    each = [record.figures.counters for record in records]
    for name in ("hot", "warm", "cold", "read_bytes", "ahead_issued"):
        assert sum(getattr(counters, name) for counters in each) == getattr(total, name)
    assert [counters.lookups for counters in each[1:]] == [4 * 3] * 7, "layers times top-k"
    assert all(record.figures.seconds > 0 for record in records)


def test_timings_cover_every_layer_and_what_comes_after(model: Model) -> None:
    with tierrun.load(model.store, ram=str(model.smallest)) as engine:
        list(engine.generate(PROMPT, 3, ignore_eos=True))
        timings = list(engine.ledger.timings)
        nbytes = engine.store.manifest.class_of(0).nbytes
    assert [timing.layer for timing in timings] == [0, 1, 2, 3, 4] * 3
    assert [timing.tokens for timing in timings] == [40] * 5 + [1] * 10
    assert [timing.step for timing in timings] == [1] * 5 + [2] * 5 + [3] * 5
    assert sum(timing.read_bytes for timing in timings) == engine.ledger.counters.cold * nbytes


def test_after_a_prompt_the_policy_knows_what_its_last_token_wanted(model: Model) -> None:
    """The best guess at what the answer will want."""
    with tierrun.load(model.store, ram="1GiB") as engine:
        engine.session().prefill(PROMPT)
        placement = engine.residency.placement
        for layer in range(4):
            worth = placement.policy.worth(placement.indices(layer, range(8)), placement.step)
            assert (worth > 0).sum() == 3, "of all the experts that the prompt used"


# -- sessions ----------------------------------------------------------------------------------


def test_a_session_reuses_the_context_it_has(model: Model) -> None:
    """A conversation that grows costs its new tokens only, and gives what it would in one go."""
    with tierrun.load(model.store, ram="1GiB") as engine:
        session = engine.session()
        first = ids(list(engine.generate(PROMPT[:20], 5, session=session, ignore_eos=True)))
        longer = [*PROMPT[:20], *first, *PROMPT[20:]]
        before = len(engine.ledger.timings)
        second = ids(list(engine.generate(longer, 5, session=session, ignore_eos=True)))
        prefilled = list(engine.ledger.timings)[before].tokens
        assert prefilled == len(longer) - (20 + 4), "four of five answer tokens are in the context"
        assert second == ids(list(engine.generate(longer, 5, ignore_eos=True)))


@pytest.mark.parametrize(
    "prompt", [PROMPT[:10], PROMPT[5:], PROMPT], ids=["prefix", "other", "same"]
)
def test_a_session_with_another_context_starts_again(prompt: list[int], model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        session = engine.session()
        session.prefill(PROMPT)
        continued = ids(list(engine.generate(prompt, 5, session=session, ignore_eos=True)))
        assert continued == ids(list(engine.generate(prompt, 5, ignore_eos=True)))


def test_sessions_do_not_mix(model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        wanted = [ids(list(engine.generate(PROMPT[:n], 6, ignore_eos=True))) for n in (9, 17)]
        both = [engine.generate(PROMPT[:n], 6, ignore_eos=True) for n in (9, 17)]
        turns = list(zip(*both, strict=True))
        assert [[record.id for record in turn] for turn in zip(*turns, strict=True)] == wanted


# -- Ctrl-C ------------------------------------------------------------------------------------


def test_an_interrupted_engine_is_usable_afterwards(model: Model) -> None:
    with tierrun.load(model.store, ram=str(model.smallest)) as engine:
        wanted = ids(list(engine.generate(PROMPT, 8, ignore_eos=True)))
        answer = engine.generate(PROMPT, 8, ignore_eos=True)
        begun = [next(answer).id for _ in range(3)]
        engine.hook.interrupted = True
        with pytest.raises(Interrupted):
            next(answer)
        engine.hook.interrupted = False
        assert begun == wanted[:3]
        engine.residency.check_integrity()
        assert ids(list(engine.generate(PROMPT, 8, ignore_eos=True))) == wanted


def interrupt_in_layer(engine: Engine, layer: int) -> Callable[[], None]:
    """Let the flag go up while a layer runs, as a signal handler does; returns how to undo it."""
    module = engine.model.model.layers[layer]

    def raise_flag(*_: object) -> None:
        engine.hook.interrupted = True

    handle = module.register_forward_pre_hook(raise_flag)

    def undo() -> None:
        handle.remove()
        engine.hook.interrupted = False

    return undo


def test_a_session_interrupted_between_layers_starts_clean(model: Model) -> None:
    """Some layers had the new token in their cache already."""
    with tierrun.load(model.store, ram="1GiB") as engine:
        wanted = engine.session().extend_to([*PROMPT, 11])
        session = engine.session()
        session.prefill(PROMPT)
        undo = interrupt_in_layer(engine, 2)
        with pytest.raises(Interrupted):
            session.prefill([11])
        undo()
        assert torch.equal(session.extend_to([*PROMPT, 11]), wanted)


# -- usage -------------------------------------------------------------------------------------


def test_what_was_used_is_counted_in_the_store(own_store: Path) -> None:
    for run in (1, 2):
        with tierrun.load(own_store, ram="1GiB") as engine:
            list(engine.generate(PROMPT, 4, ignore_eos=True))
        counts = json.loads((own_store / "usage.json").read_text())["counts"]
        per_layer = run * (len(PROMPT) + 3) * 3
        assert [sum(row) for row in counts] == [per_layer] * 4, "tokens times top-k"


def test_usage_is_saved_once(own_store: Path) -> None:
    with tierrun.load(own_store, ram="1GiB") as engine:
        list(engine.generate(PROMPT, 1))
        engine.save_usage()
        engine.save_usage()
    counts = json.loads((own_store / "usage.json").read_text())["counts"]
    assert sum(map(sum, counts)) == len(PROMPT) * 3 * 4


def test_an_engine_that_ran_nothing_writes_nothing(own_store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own_store.rglob("*")}
    tierrun.load(own_store, ram="1GiB").close()
    assert {path: path.stat().st_mtime_ns for path in own_store.rglob("*")} == before
