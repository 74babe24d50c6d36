"""Tokenizers rebuilt from metadata give the ids of the original ones, or are refused by name."""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gguf_tokenizers import SPLITS as PUBLISHED
from tests.ggufs import FIXTURES
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

from tierrun.engine.text import load_tokenizer
from tierrun.tools.convert import convert
from tierrun.tools.sources.gguf_header import read_gguf_header
from tierrun.tools.sources.gguf_splits import SPLITS
from tierrun.tools.sources.gguf_tokenizer import Vocabulary, tokenizer_json

TEXTS = (
    "Hello world, it's 12345 O'CLOCK'LL! don't DON'T we'Ve",
    "3.14159 1,000,000 ½ ² 007 1234567",
    "日本語 テキスト 한국어 12 中文abc。",
    "a\n\n  b\r\n\tc   ",
    " lead",
    "  two  spaces   three",
    "🎉🎊 emoji👍🏽 e\u0301 नमस्ते ñ",
    "//foo/bar\n/baz $x += y_z; <tag/>",
    "camelCaseHTTPServer ÀÉî Ǆungla ა 𝐀",
    "\u3000ideographic\u00a0nbsp ▁x <0x41>",
    "",
    "<｜bos▁token｜>x<｜bos▁token｜> <think>y</think>",
)
CORPUS = " ".join(TEXTS[:10]) * 3

BOS, THINK = "<｜bos▁token｜>", "<think>"
GPT2 = "olmo"
"""The way of splitting that tokenizers has built in."""

CONTROL, USER_DEFINED, BYTE = 3, 4, 6


@cache
def _across_words() -> str:
    """A byte-level BPE whose merges go across words, so that every split shows in the ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[BOS, THINK],
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    text: str = tokenizer.to_str()
    return text


def original(patterns: list[str]) -> Tokenizer:
    """A tokenizer that splits by `patterns` (by GPT-2's where there are none)."""
    tokenizer = Tokenizer.from_str(_across_words())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metadata_of(tokenizer: Tokenizer, kind: str, pre: str, **more: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for `tokenizer`."""
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = {BOS: CONTROL, THINK: USER_DEFINED}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    about = {
        "model": kind,
        "pre": pre,
        "tokens": tokens,
        "token_type": [types.get(token, 1) for token in tokens],
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (about | more).items()}


def rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    vocabulary = Vocabulary.of(metadata)
    assert vocabulary is not None
    return Tokenizer.from_str(tokenizer_json(vocabulary))


KNOWN = {name: [pattern] for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items()} | PUBLISHED
KNOWN |= {"chatglm-bpe": KNOWN["glm4"], GPT2: [], "gpt-2": [], "phi-2": [], "jais": []}
del KNOWN["deepseek-llm"]  # there the published pattern is a list of letters


@pytest.mark.parametrize("pre", sorted(SPLITS.keys() & KNOWN.keys()))
def test_ids_of_the_original(pre: str) -> None:
    theirs = original(KNOWN[pre])
    theirs.model.ignore_merges = SPLITS[pre].whole_words
    ours = rebuilt(metadata_of(theirs, "gpt2", pre))
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text).ids, text
        assert decoded(ours, ids) == decoded(theirs, ids)


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    return text


@settings(max_examples=200)
@given(st.text(max_size=30) | st.text("aZ9é.,'sLl \n\r\t/中١", max_size=30))
def test_words_of_the_original(text: str) -> None:
    for pre in ("llama-bpe", "glm4", "qwen2", "qwen35", "gpt-4o", "tekken", "deepseek-v3", GPT2):
        theirs, ours = splitter(pre, KNOWN[pre]), splitter(pre, None)
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), pre


@cache
def _splitters() -> dict[str, Any]:
    return {}


def splitter(pre: str, patterns: list[str] | None) -> Any:
    key = f"{pre} {patterns is None}"
    if key not in _splitters():
        theirs = original(patterns or [])
        made = rebuilt(metadata_of(theirs, "gpt2", pre)) if patterns is None else theirs
        _splitters()[key] = made.pre_tokenizer
    return _splitters()[key]


def words(pre: str, text: str) -> list[str]:
    """How `pre` splits ASCII text; a space is Ġ, a new line Ċ."""
    return [word for word, _ in splitter(pre, None).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "wanted"),
    [
        ("deepseek-llm", "ab 12c, d", ["ab", "Ġ", "12", "c", ",", "Ġd"]),
        ("deepseek-coder", "ab 12c, d", ["ab", "Ġ", "1", "2", "c", ",", "Ġd"]),
        ("default", "it's $12345", ["it", "'", "s", "Ġ", "$", "123", "45"]),
        ("starcoder", "x 123", ["x", "Ġ", "1", "2", "3"]),
        ("tiny_aya", "1234567", ["1", "234", "567"]),
        ("bailingmoe2", "I'm 12", ["I", "'m", "Ġ", "1", "2"]),
        ("seed-coder", "a+\n1", ["a", "+", "Ċ", "1"]),
        ("tekken", "HTTPServer's 12", ["HTTPServer", "'s", "Ġ", "1", "2"]),
    ],
)
def test_words_as_llama_cpp_splits_them(pre: str, text: str, wanted: list[str]) -> None:
    assert words(pre, text) == wanted


@pytest.mark.parametrize("name", [path.name for path in sorted(FIXTURES.iterdir())])
def test_fixtures_keep_their_ids(name: str, tmp_path: Path) -> None:
    source = sorted((FIXTURES / name).glob("*.gguf"))[0]
    (tmp_path / "config").mkdir()
    shutil.copy(FIXTURES / name / "config.json", tmp_path / "config")
    convert(source, tmp_path / "store", config=tmp_path / "config")
    ours = load_tokenizer(tmp_path / "store" / "model")
    theirs = AutoTokenizer.from_pretrained(FIXTURES / name)  # type: ignore[no-untyped-call]
    assert ours is not None and ours.chat_template == theirs.chat_template
    metadata = read_gguf_header(source).metadata
    for text in (*TEXTS, "<|im_start|>user\nhi<|im_end|>\n<|eos|>", "<|turn>x<turn|><eos>"):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        if "llama-bpe" not in metadata.values():  # to which llama.cpp adds BOS, told or not
            assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, role) == getattr(theirs, role)


VOCABULARIES = Path(os.environ.get("LLAMA_CPP", "nowhere")) / "models"
"""Published vocabularies in a checkout of llama.cpp, with ids that the original tokenizers gave."""


@pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("path", sorted(VOCABULARIES.glob("*.inp")))
def test_ids_of_published_tokenizers(path: Path) -> None:
    metadata = read_gguf_header(path.with_suffix("")).metadata
    if metadata["tokenizer.ggml.model"] == "bert":
        pytest.skip("no language model's tokenizer")
    tokenizer = rebuilt(metadata)
    texts = path.read_text().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".out").read_text().split("\n")
    for text, line in zip(texts, lines, strict=False):
        ids = [int(word) for word in line.split()]
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


# sentencepiece


def sentencepiece() -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """A tokenizer like Mixtral's, and what a GGUF says of it: scores instead of merges."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    corpus = CORPUS.replace("<0x41>", "")
    trained.train_from_iterator([corpus], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    joined = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    letters = [piece for piece in model["vocab"] if len(piece) == 1]
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *letters]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    scores = [0.0] * 259 + [-float(number) for number in range(len(pieces) - 259)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=generate_merges(vocab, dict(zip(pieces, scores, strict=True))),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    types = [2, CONTROL, CONTROL, *[BYTE] * 256, *[1] * (len(pieces) - 259)]
    about = {
        "model": "llama",
        "tokens": pieces,
        "token_type": types,
        "scores": scores,
    }
    return fast, {f"tokenizer.ggml.{key}": value for key, value in about.items()}


def test_sentencepiece_ids() -> None:
    theirs, metadata = sentencepiece()
    ours = rebuilt(metadata)
    for text in (*TEXTS, "one</s> two<s>three", "<unk>"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.encode(text).ids == [1, *ids]  # llama.cpp adds BOS unless told not to
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_sentencepiece_without_leading_space() -> None:
    _, metadata = sentencepiece()
    metadata |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    ours = rebuilt(metadata)
    assert ours.encode("two").tokens[0] == "t" and ours.decode(ours.encode("two").ids) == "two"
