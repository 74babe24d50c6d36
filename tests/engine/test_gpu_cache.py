"""The fixed key-value cache gives what transformers' growing one gives, in both of its modes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tests.checkpoints import reference
from tests.engine.conftest import PROMPT, Model
from tests.engine.models import ACCEPTED

from tierrun.engine.gpu.cache import FixedCache, GrowingCache, WindowLayer, make_cache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNKS = (16, 16, 8, 1, 9, *(1,) * 15)
"""Tokens at once: prompts (free) and decode (fixed) in turn, past every window."""

make = partial(make_cache, device=DEVICE)


@pytest.fixture(autouse=True)
def _fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in fp32 on a GPU too, as products of matrices are by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def loaded(model: Model) -> Any:
    """What transformers loads, in the memory that kernels read: a GPU's, if they are compiled."""
    found: Any = reference(model.checkpoint)
    return found.to(DEVICE)


@pytest.mark.parametrize("family", ACCEPTED)
def test_logits_are_those_of_a_growing_cache(family: str, model_of: Callable[[str], Model]) -> None:
    model = loaded(model_of(family))
    tokens = torch.tensor([[*PROMPT, *reversed(PROMPT)]], device=DEVICE)[:, : sum(CHUNKS)]
    cache = make(model.config, 128, max(CHUNKS), torch.float32)
    assert isinstance(cache, FixedCache)
    with torch.no_grad():
        wanted = model(tokens).logits[0]
        found = []
        for count in CHUNKS:
            cache.begin(count, fixed=count <= 8)
            piece = tokens[:, cache.length : cache.length + count]
            found.append(model(piece, past_key_values=cache, use_cache=True).logits[0])
            cache.end(count)
    assert (torch.cat(found) - wanted).abs().max() < (2e-3 if DEVICE.type == "cuda" else 1e-3)


def passes(model: Any, cache: FixedCache, chunks: Sequence[int], tokens: torch.Tensor) -> Any:
    """Logits of the next tokens, so many at once."""
    found = []
    for count in chunks:
        if cache.room_for(cache.length + count) > cache.room:
            cache.resize(cache.room_for(cache.length + count))
        cache.begin(count, fixed=count <= 8)
        piece = tokens[:, cache.length : cache.length + count]
        found.append(model(piece, past_key_values=cache, use_cache=True).logits[0])
        cache.end(count)
    return torch.cat(found)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_one_that_grows_gives_the_bits_of_one_allocated_at_once(
    family: str, model_of: Callable[[str], Model]
) -> None:
    model = loaded(model_of(family))
    tokens = torch.tensor([PROMPT * 30], device=DEVICE)
    chunks = (256, 1, 8, 240, *(1,) * 10, 256, 250, *(1,) * 8)
    found, rooms = [], []
    for least in (512, 4096):
        cache = make(model.config, 1500, 256, torch.float32, least_room=least)
        assert isinstance(cache, FixedCache)
        with torch.inference_mode():
            found.append(passes(model, cache, chunks, tokens))
            rooms.append(cache.room)
            cache.reset()
            room = cache.room_for(8)
            wanted = cache.nbytes + cache.nbytes_more(room)
            cache.resize(room)
            assert cache.nbytes == wanted and room == (512 if least == 512 else 1500)
            found.append(passes(model, cache, chunks, tokens))
    assert rooms == [1500, 1500]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_room_is_a_power_of_two_or_all(model_of: Callable[[str], Model]) -> None:
    config = reference(model_of("qwen3_moe").checkpoint).config
    cache = make(config, 5000, 512, torch.float16)
    assert cache.room == 2048
    rooms = [cache.room_for(length) for length in (0, 2048, 2049, 4096, 4097, 5000)]
    assert rooms == [2048, 2048, 4096, 4096, 5000, 5000]
    assert make(config, 9000, 2048, torch.float16).room == 4096, "two chunks at least"
    assert make(config, 300, 512, torch.float16).room == 300


def test_windows_stay_as_they_are(model_of: Callable[[str], Model]) -> None:
    """Only layers of full attention grow; where there is none, nothing does."""
    model = loaded(model_of("gpt_oss"))
    cache = make(model.config, 512, 4, torch.float32, least_room=16)
    assert isinstance(cache, FixedCache)
    with torch.inference_mode():
        passes(model, cache, [4], torch.tensor([PROMPT], device=DEVICE))
        windows = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
        held = [layer.keys for layer in windows]
        cache.resize(512)
    assert windows and all(a is layer.keys for a, layer in zip(held, windows, strict=True))
    config = model.config
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    assert make(config, 4096, 16, torch.float32, least_room=64).room == 4096


def test_memory_that_is_refused_half_way_loses_nothing(
    model_of: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(model_of("qwen3_moe"))
    cache = make(model.config, 64, 4, torch.float32, least_room=16)
    assert isinstance(cache, FixedCache)
    tokens, left = torch.tensor([PROMPT], device=DEVICE), 3
    with torch.inference_mode():
        wanted = passes(model, cache, [4, 1, 1], tokens)
        cache.reset()
        found = [passes(model, cache, [4], tokens)]
        plain = torch.Tensor.new_zeros

        def refuse(self: torch.Tensor, *shape: int) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError
            return plain(self, *shape)

        monkeypatch.setattr(torch.Tensor, "new_zeros", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            cache.resize(32)
        assert cache.room == 16
        found.append(passes(model, cache, [1], tokens))
        left = 99
        cache.resize(32)
        found.append(passes(model, cache, [1], tokens))
    assert cache.room == 32 and torch.equal(torch.cat(found), wanted)


def test_a_window_holds_less_than_the_context(model_of: Callable[[str], Model]) -> None:
    model = loaded(model_of("gpt_oss"))
    cache = make(model.config, 4096, 16, torch.float32)
    windows = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
    assert windows and all(layer.max_cache_len < 256 for layer in windows)


def test_an_architecture_without_a_fixed_cache_makes_its_own(
    model_of: Callable[[str], Model], caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(model_of("deepseek_v4"))
    assert isinstance(make(model.config, 128, 16, torch.float32), GrowingCache)
    assert "grows by copying" in caplog.text
