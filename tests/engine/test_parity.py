"""Every family's logits and tokens are transformers' own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.checkpoints import reference
from tests.engine.conftest import PROMPT, Model, Reference, convert
from tests.engine.models import ACCEPTED, OTHERS, save_runnable

import tierrun

ModelOf = Callable[[str], Model]
ReferenceOf = Callable[[str], Reference]

FAMILIES = (*ACCEPTED, *OTHERS)

UBATCHES = {family: (1, 7, 16, 39) for family in ACCEPTED} | dict.fromkeys(OTHERS, (7,))
"""Chunks of the prompt; 39 leaves a single token for the last."""


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_own(
    family: str, model_of: ModelOf, reference_of: ReferenceOf
) -> None:
    with tierrun.load(model_of(family).store, ram="1GiB") as engine:
        logits = engine.logits(PROMPT)
    assert logits.shape == reference_of(family).logits.shape
    assert (logits - reference_of(family).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_transformers_own(
    family: str, model_of: ModelOf, reference_of: ReferenceOf
) -> None:
    """At the smallest budget that works, so that nearly every expert is read and evicted."""
    store, smallest = model_of(family).store, model_of(family).smallest
    with tierrun.load(store, ram=str(smallest)) as engine:
        tokens = [record.id for record in engine.generate(PROMPT, 32, ignore_eos=True)]
        assert engine.stats().warm_bytes <= smallest
    assert tokens == reference_of(family).greedy
    assert len(set(tokens)) > 2, "a model that repeats itself proves little"


@pytest.mark.parametrize(
    ("family", "ubatch"), [(family, n) for family in FAMILIES for n in UBATCHES[family]]
)
def test_a_prompt_in_chunks_gives_the_same_tokens(
    family: str, ubatch: int, model_of: ModelOf, reference_of: ReferenceOf
) -> None:
    """Recurrent layers, sliding windows and compressed caches carry over from chunk to chunk."""
    with tierrun.load(model_of(family).store, ram="1GiB", ubatch=ubatch) as engine:
        logits = engine.logits(PROMPT)
        tokens = [record.id for record in engine.generate(PROMPT, 32, ignore_eos=True)]
    assert tokens == reference_of(family).greedy
    assert (logits - reference_of(family).logits).abs().max() <= 1e-3


@pytest.mark.parametrize("family", ACCEPTED)
def test_lookahead_finds_the_router(family: str, model_of: ModelOf) -> None:
    store, smallest = model_of(family).store, model_of(family).smallest
    with tierrun.load(store, ram=str(smallest)) as engine:
        list(engine.generate(PROMPT, 16, ignore_eos=True))
        counters = engine.stats().counters
    assert counters.ahead_issued > 0
    assert counters.ahead_useful + counters.ahead_late > 0, "and what it says comes true"


@pytest.mark.parametrize("family", ACCEPTED)
def test_a_bf16_checkpoint_runs_as_its_widening_to_fp32(family: str, tmp_path: Path) -> None:
    """As published checkpoints come: weights stay as stored, arithmetic is fp32."""
    save_runnable(family, tmp_path / "checkpoint", dtype=torch.bfloat16)
    model = convert(family, tmp_path / "checkpoint", tmp_path / "store")
    with torch.no_grad():
        theirs = reference(model.checkpoint, torch.float32)(torch.tensor([PROMPT])).logits[0]
    with tierrun.load(model.store, ram=str(model.smallest)) as engine:
        logits = engine.logits(PROMPT)
        assert engine.stats().resident_bytes < 3 * sum(
            p.numel() for p in engine.model.parameters() if not p.is_meta
        ), "two bytes each"
    assert (logits - theirs).abs().max() <= 1e-4
