"""The fixed key-value cache gives what transformers' growing one gives, in both of its modes."""

from collections.abc import Callable

import pytest
import torch
from tests.checkpoints import reference
from tests.engine.conftest import PROMPT, Model
from tests.engine.models import ACCEPTED

from tierrun.engine.gpu.cache import FixedCache, GrowingCache, WindowLayer, make_cache

CHUNKS = (16, 16, 8, 1, 9, *(1,) * 15)
"""Tokens at once: prompts (free) and decode (fixed) in turn, past every window."""


@pytest.mark.parametrize("family", ACCEPTED)
def test_logits_are_those_of_a_growing_cache(family: str, model_of: Callable[[str], Model]) -> None:
    model = reference(model_of(family).checkpoint)
    tokens = torch.tensor([[*PROMPT, *reversed(PROMPT)]])[:, : sum(CHUNKS)]
    cache = make_cache(model.config, 128, max(CHUNKS), torch.float32)
    assert isinstance(cache, FixedCache)
    with torch.no_grad():
        wanted = model(tokens).logits[0]
        found = []
        for count in CHUNKS:
            cache.begin(count, fixed=count <= 8)
            piece = tokens[:, cache.length : cache.length + count]
            found.append(model(piece, past_key_values=cache, use_cache=True).logits[0])
            cache.end(count)
    assert (torch.cat(found) - wanted).abs().max() < 1e-3


def test_a_window_holds_less_than_the_context(model_of: Callable[[str], Model]) -> None:
    model = reference(model_of("gpt_oss").checkpoint)
    cache = make_cache(model.config, 4096, 16, torch.float32)
    windows = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
    assert windows and all(layer.max_cache_len < 256 for layer in windows)


def test_an_architecture_without_a_fixed_cache_makes_its_own(
    model_of: Callable[[str], Model], caplog: pytest.LogCaptureFixture
) -> None:
    model = reference(model_of("deepseek_v4").checkpoint)
    assert isinstance(make_cache(model.config, 128, 16, torch.float32), GrowingCache)
    assert "grows by copying" in caplog.text
