"""Logits are the same to the last bit, and tokens the same, wherever experts are and come from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import PROMPT, Model

import tierrun
from tierrun.engine.engine import Engine
from tierrun.io.errors import CorruptError
from tierrun.io.store import ExpertKey, Store

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
"""Plain; with biases; with a dense first layer, shared experts and a compressed cache."""


class Outcome(NamedTuple):
    """All that must not depend on how an engine is set up."""

    prefill: torch.Tensor
    decode: torch.Tensor
    tokens: list[int]


def run(engine: Engine) -> Outcome:
    tokens = [record.id for record in engine.generate(PROMPT, 64, ignore_eos=True)]
    session = engine.session()
    prefill = session.logits(PROMPT)
    decode = torch.stack([session.prefill([token]) for token in tokens[:24]])
    return Outcome(prefill, decode, tokens)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert torch.equal(ours.prefill, theirs.prefill)
    assert torch.equal(ours.decode, theirs.decode)
    assert ours.tokens == theirs.tokens


@pytest.fixture(scope="module")
def outcome_of(model_of: Callable[[str], Model]) -> Iterator[Callable[[str], Outcome]]:
    """With every expert in memory and no look-ahead."""
    found: dict[str, Outcome] = {}

    def make(family: str) -> Outcome:
        if family not in found:
            with tierrun.load(model_of(family).store, ram="1GiB", lookahead=False) as engine:
                found[family] = run(engine)
        return found[family]

    yield make


def budgets(model: Model) -> dict[str, dict[str, str]]:
    """--ram and --vram from the least to room for all."""
    least, most = model.smallest, model.expert_bytes
    return {
        "warm, smallest": {"ram": str(least), "vram": "0"},
        "warm, half": {"ram": str(max(least, most // 2)), "vram": "0"},
        "warm, all": {"ram": str(most), "vram": "0"},
        "hot, smallest": {"ram": "0", "vram": str(least)},
        "hot, all": {"ram": "0", "vram": str(most)},
        "both, smallest": {"ram": str(least), "vram": str(least // 2)},
        "both, half": {"ram": str(max(least, most // 2)), "vram": str(most // 2)},
    }


NAMES = (
    "warm, smallest",
    "warm, half",
    "warm, all",
    "hot, smallest",
    "hot, all",
    "both, smallest",
    "both, half",
)


@pytest.mark.parametrize("policy", ["lru", "lfru", "rates"])
@pytest.mark.parametrize("lookahead", [True, False], ids=["ahead", "behind"])
@pytest.mark.parametrize("budget", NAMES)
def test_any_budget_policy_and_lookahead_gives_the_same_bits(
    budget: str, lookahead: bool, policy: str, model: Model, outcome_of: Callable[[str], Outcome]
) -> None:
    options = budgets(model)[budget]
    with tierrun.load(model.store, policy=policy, lookahead=lookahead, **options) as engine:
        assert_same(run(engine), outcome_of(model.family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reader", ["direct", "mmap", "buffered"])
def test_any_reader_gives_the_same_bits(
    family: str,
    reader: str,
    model_of: Callable[[str], Model],
    outcome_of: Callable[[str], Outcome],
) -> None:
    model = model_of(family)
    with tierrun.load(model.store, ram=str(model.smallest), io=reader) as engine:
        assert_same(run(engine), outcome_of(family))


def test_several_directories_give_the_same_bits(
    model: Model, outcome_of: Callable[[str], Outcome], tmp_path: Path
) -> None:
    directories = [tmp_path / name for name in "abc"]
    tierrun.convert(model.checkpoint, directories)
    with tierrun.load(directories, ram=str(model.smallest)) as engine:
        assert_same(run(engine), outcome_of(model.family))


def test_a_store_may_be_moved(
    model: Model, own_store: Path, outcome_of: Callable[[str], Outcome]
) -> None:
    moved = own_store.rename(own_store.parent / "moved")
    with tierrun.load(moved, ram=str(model.smallest)) as engine:
        assert_same(run(engine), outcome_of(model.family))


def test_a_warm_engine_gives_the_same_bits_as_a_cold_one(
    model: Model, outcome_of: Callable[[str], Outcome]
) -> None:
    """What earlier requests left in the tiers changes speed only."""
    with tierrun.load(model.store, ram=str(model.expert_bytes // 2)) as engine:
        for seed in range(3):
            list(engine.generate([seed + 3, 7, 9], 8, ignore_eos=True))
            assert_same(run(engine), outcome_of(model.family))


options = st.fixed_dictionaries(
    {
        "share": st.floats(0, 1.2),
        "hot": st.floats(0, 1.2),
        "policy": st.sampled_from(["lru", "lfru", "rates"]),
        "lookahead": st.booleans(),
        "io": st.sampled_from(["auto", "direct", "mmap", "buffered"]),
        "depth": st.integers(1, 9),
    }
)


@given(options=options, family=st.sampled_from(FAMILIES))
@settings(max_examples=25)
def test_whatever_is_asked_the_bits_are_the_same(
    options: dict[str, Any],
    family: str,
    model_of: Callable[[str], Model],
    outcome_of: Callable[[str], Outcome],
) -> None:
    model = model_of(family)
    ram = model.smallest + int(options.pop("share") * (model.expert_bytes - model.smallest))
    vram = int(options.pop("hot") * model.expert_bytes)
    with tierrun.load(model.store, ram=str(ram), vram=str(vram), **options) as engine:
        assert engine.stats().warm_bytes <= ram and engine.stats().hot_bytes <= vram
        assert_same(run(engine), outcome_of(family))
        engine.residency.check_integrity()


@given(ubatch=st.integers(1, 64), family=st.sampled_from(FAMILIES))
@settings(max_examples=10)
def test_any_chunk_size_gives_the_same_tokens(
    ubatch: int,
    family: str,
    model_of: Callable[[str], Model],
    outcome_of: Callable[[str], Outcome],
) -> None:
    with tierrun.load(model_of(family).store, ram="1GiB", ubatch=ubatch) as engine:
        tokens = [record.id for record in engine.generate(PROMPT, 64, ignore_eos=True)]
    assert tokens == outcome_of(family).tokens


# -- a flipped bit ------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0b100]))


@pytest.mark.parametrize("reader", ["direct", "mmap", "buffered"])
@pytest.mark.parametrize("place", [0, 0.4, 1], ids=["first byte", "within", "last byte"])
def test_a_flipped_bit_is_caught_with_layer_and_expert_named(
    place: float, reader: str, own_store: Path
) -> None:
    with tierrun.load(own_store, ram="1GiB") as engine:
        list(engine.generate(PROMPT, 1))
        expert = int(engine.hook.usage[2].argmax())
        record, extent = engine.store.locate(ExpertKey(2, expert))
        path = engine.store.shard_paths[record.shard]
    flip(path, extent.offset + int(place * (extent.nbytes - 1)))
    with tierrun.load(own_store, ram="1GiB", io=reader) as engine:
        for _ in range(2):
            with pytest.raises(CorruptError, match=f"layer 2, expert {expert} ") as caught:
                list(engine.generate(PROMPT, 1))
            assert str(path) in str(caught.value)


def test_an_engine_survives_a_corrupt_record(
    own_store: Path, outcome_of: Callable[[str], Outcome]
) -> None:
    """Restored under the running engine, the record is read again and all is as before."""
    store = Store.open([own_store])
    record, extent = store.locate(ExpertKey(1, 3))
    flip(store.shard_paths[record.shard], extent.offset)
    with tierrun.load(own_store, ram="1GiB") as engine:
        with pytest.raises(CorruptError):
            list(engine.generate(PROMPT, 64, ignore_eos=True))
        flip(store.shard_paths[record.shard], extent.offset)
        assert_same(run(engine), outcome_of("qwen3_moe"))
        engine.residency.check_integrity()


def test_a_flipped_bit_in_a_resident_weight_is_caught_at_load(own_store: Path) -> None:
    store = Store.open([own_store])
    for resident in store.manifest.residents[::5]:
        path = store.shard_paths[resident.shard]
        flip(path, resident.extent.end - 1)
        with pytest.raises(
            CorruptError, match=f"resident weight {resident.name} differs"
        ) as caught:
            tierrun.load(own_store, ram="1GiB")
        assert str(path) in str(caught.value)
        flip(path, resident.extent.end - 1)
    tierrun.load(own_store, ram="1GiB").close()
