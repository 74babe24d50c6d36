"""The files beside a GGUF's weights: what ends an answer, sampling, tokenizers that are refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.ggufs import FIXTURES, spoilt
from tokenizers import Tokenizer

from tierrun.engine.text import load_tokenizer
from tierrun.io.errors import CheckpointError
from tierrun.tools.convert import convert
from tierrun.tools.sources.gguf_ends import end_tokens
from tierrun.tools.sources.gguf_tokenizer import TokenizerError, Vocabulary, tokenizer_json


def test_end_tokens_as_llama_cpp_finds_them() -> None:
    def ends(tokens: list[str], **ids: int) -> Any:
        said: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": n for name, n in ids.items()}
        return end_tokens(said | {"tokenizer.ggml.tokens": tokens}).get("eos_token_id")

    assert ends(["a", "b"]) is None
    assert ends(["a", "b"], eos=1) == 1
    assert ends(["<|im_end|>", "b", "c"], eos=1, eot=2) == [0, 1, 2]
    assert ends(["<|end|>", "<|return|>", "<|call|>"], eos=1) == [1, 2]
    assert ends(["<|end|>", "b"], eos=1) == [0, 1]
    assert ends(["</s>", "<|tool_response>", "<eos>"], eos=2) == [1, 2]
    assert ends(["a"], eos=7) is None


def test_generation_config(tmp_path: Path) -> None:
    sampling = {"temp": 0.6, "top_k": 20, "penalty_repeat": 1.05}
    more = {f"general.sampling.{key}": value for key, value in sampling.items()}
    path = spoilt("mixtral", tmp_path / "a.gguf", metadata=lambda said: said.update(more))
    convert(path, tmp_path / "store")
    found = json.loads((tmp_path / "store/model/generation_config.json").read_text())
    assert found.pop("temperature") == pytest.approx(0.6)
    assert found.pop("repetition_penalty") == pytest.approx(1.05)
    assert found == {
        "bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 3, 8], "pad_token_id": 0,
        "top_k": 20,
    }  # fmt: skip


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(metadata: dict[str, Any]) -> None:
        for key, value in values.items():
            if value is None:
                del metadata[f"tokenizer.ggml.{key}"]
            else:
                metadata[f"tokenizer.ggml.{key}"] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(pre="kimi-k2"), "its pre-tokenizer 'kimi-k2' is not known"),
        (changed(model="t5"), "its kind 't5' is not supported"),
        (changed(merges=None), "tokenizer.ggml.merges is missing"),
        (changed(tokens=["a", "b", "a"]), "some are spelt alike"),
        (changed(merges=["x y"]), "the merge 'x y' is not of two of its tokens"),
        (changed(merges=["xy"]), "the merge 'xy' is not of two of its tokens"),
        (changed(token_type=[1]), "token_type has 1 entries for"),
        (changed(tokens=[1, 2]), "tokens is missing or is no list of str"),
    ],
)
def test_refused_by_name(change: Any, words: str, tmp_path: Path) -> None:
    path = spoilt("mixtral", tmp_path / "a.gguf", metadata=change)
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "store", config=None)
    text = str(caught.value)
    assert words in text and "--tokenizer" in text and "\n" not in text
    assert not (tmp_path / "store").exists()
    convert(path, tmp_path / "store", tokenizer=FIXTURES / "mixtral")
    original = (FIXTURES / "mixtral" / "tokenizer.json").read_bytes()
    assert (tmp_path / "store/model/tokenizer.json").read_bytes() == original


def test_file_without_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = spoilt("mixtral", tmp_path / "a.gguf", metadata=changed(model="no_vocab", tokens=None))
    with caplog.at_level(logging.WARNING, "tierrun"):
        convert(path, tmp_path / "store")
    assert caplog.text.count("a.gguf has no tokenizer") == 1
    assert load_tokenizer(tmp_path / "store" / "model") is None


def test_directory_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no tokenizer\.json"):
        convert(FIXTURES / "mixtral/mixtral.gguf", tmp_path / "store", tokenizer=tmp_path / "empty")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


_PIECES = st.text("abĠ▁<\n", max_size=3)


@given(
    st.fixed_dictionaries(
        {"tokenizer.ggml.model": st.sampled_from(["gpt2", "llama", "gemma4", "x"])},
        optional={
            f"tokenizer.ggml.{name}": _JSON | st.lists(st.text(max_size=3), max_size=6)
            for name in ("scores", "token_type", "pre", "bos_token_id", "unknown_token_id")
        }
        | {
            "tokenizer.ggml.tokens": _JSON | st.lists(_PIECES, max_size=9, unique=True),
            "tokenizer.ggml.merges": _JSON | st.lists(st.tuples(_PIECES, _PIECES).map(" ".join)),
        },
    )
)
def test_any_metadata_makes_a_tokenizer_or_its_error(metadata: dict[str, Any]) -> None:
    try:
        vocabulary = Vocabulary.of(metadata)
        if vocabulary is not None:
            Tokenizer.from_str(tokenizer_json(vocabulary)).encode("a b")
    except TokenizerError as error:
        assert "\n" not in str(error)
