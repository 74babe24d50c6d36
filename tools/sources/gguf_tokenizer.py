"""A Hugging Face tokenizer from the vocabulary in a GGUF's metadata.

Written as tokenizer.json directly: transformers' own builder takes GPT-2's split for every one
that it does not know, and respells special tokens that have letters beyond ASCII (DeepSeek's).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tierrun.tools.sources.gguf_splits import SPLITS

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_LONGEST_PIECE = 512
"""Characters of a sentencepiece token that merges are looked for in; published ones have fewer."""

_Json = dict[str, Any]


class TokenizerError(Exception):
    """Why the tokenizer cannot be rebuilt."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The checked `tokenizer.ggml.*` of a file: `kind` is its model, `types` llama.cpp's."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    metadata: _Json

    @classmethod
    def of(cls, metadata: _Json) -> "Vocabulary | None":
        """The vocabulary in `metadata`; None where it has none.

        Raises:
            TokenizerError: a part is missing or is not what it should be.
        """
        kind = metadata.get("tokenizer.ggml.model", "none")
        if kind in ("none", "no_vocab"):
            return None
        tokens = _list(metadata, "tokens", str)
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        if not tokens or len(set(tokens)) < len(tokens):
            raise TokenizerError("its tokens are none, or some are spelt alike")
        types = _list(metadata, "token_type", int, len(tokens), default=1)
        pre = metadata.get("tokenizer.ggml.pre", "default")
        return cls(str(kind), str(pre), tokens, types, metadata)

    def id(self, name: str, default: int | None = None) -> int | None:
        """The id under `tokenizer.ggml.<name>_token_id`, if it is one."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        return value if type(value) is int and 0 <= value < len(self.tokens) else None

    def special(self, name: str) -> str | None:
        """The token with the role `name`: bos, eos, unknown or padding."""
        defaults = {"bos": 1, "eos": 2, "unknown": 0} if self.kind == "llama" else {}
        number = self.id(name, defaults.get(name))
        return None if number is None else self.tokens[number]

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        return value if isinstance(value, bool) else default


def _list(metadata: _Json, name: str, kind: type, count: int = 0, default: Any = None) -> list[Any]:
    """A list of `count` values at least; without a `default` it must be there."""
    key = f"tokenizer.ggml.{name}"
    values = metadata.get(key, None if default is None else [default] * count)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise TokenizerError(f"{key} is missing or is no list of {kind.__name__}")
    if len(values) < count:
        raise TokenizerError(f"{key} has {len(values)} entries for {count} tokens")
    return values


def tokenizer_json(vocabulary: Vocabulary) -> str:
    """The contents of tokenizer.json.

    Raises:
        TokenizerError: a kind of tokenizer that is not known here, or damaged parts.
    """
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma}
    if vocabulary.kind not in builders:
        raise TokenizerError(f"its kind {vocabulary.kind!r} is not supported")
    document: _Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(vocabulary)),
        **builders[vocabulary.kind](vocabulary),
    }
    return json.dumps(document, ensure_ascii=False)


def _added(vocabulary: Vocabulary) -> Iterator[_Json]:
    """The tokens that are found whole in a text: special ones, and the user's own."""
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=False)):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            yield {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }


def _byte_level(vocabulary: Vocabulary) -> _Json:
    """GPT-2's kind: tokens spell bytes as letters, merges are listed."""
    if vocabulary.pre not in SPLITS:
        raise TokenizerError(f"its pre-tokenizer {vocabulary.pre!r} is not known")
    split = SPLITS[vocabulary.pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*map(_isolate, split.patterns), byte_level | {"use_regex": False}],
        },
        "post_processor": _template(vocabulary, bos=split.bos),
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(vocabulary, _merges(vocabulary), ignore_merges=split.whole_words),
    }


def _isolate(pattern: str) -> _Json:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _sentencepiece(vocabulary: Vocabulary) -> _Json:
    """A space is a letter; merges follow from the scores; what has no token is bytes."""
    prefix = vocabulary.flag("add_space_prefix", True)
    prepend = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, _SPACES]},
        "pre_tokenizer": None,
        "post_processor": _template(vocabulary, bos=True),
        "decoder": {"type": "Sequence", "decoders": [*_PIECES, *strip]},
        "model": _bpe(vocabulary, _scored_merges(vocabulary), byte_fallback=True),
    }


def _gemma(vocabulary: Vocabulary) -> _Json:
    """As sentencepiece's, with listed merges, no leading space, and no BOS but the template's."""
    return {
        "normalizer": _SPACES,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _PIECES},
        "model": _bpe(vocabulary, _merges(vocabulary), byte_fallback=True),
    }


_SPACES: _Json = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PIECES: list[_Json] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: bool) -> _Json:
    fallback = options.get("byte_fallback", False)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.special("unknown") if fallback else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fallback,
        "byte_fallback": fallback,
        "ignore_merges": options.get("ignore_merges", False),
        "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
        "merges": merges,
    }


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The listed merges; the first part of one may begin with the space that divides them.

    Checked here, where the tokenizers library would take some hundred MB to do it.
    """
    known, pairs = set(vocabulary.tokens), []
    for merge in _list(vocabulary.metadata, "merges", str):
        place = merge.find(" ", 1)
        left, right = merge[:place], merge[place + 1 :]
        if place < 0 or not known.issuperset((left, right, left + right)):
            raise TokenizerError(f"the merge {merge!r} is not of two of its tokens to a third")
        pairs.append((left, right))
    return pairs


def _scored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third, the one with the best score first."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    scores = _list(vocabulary.metadata, "scores", float, len(ids))
    found = [
        (-scores[number], left, right)
        for token, number in ids.items()
        if len(token) <= _LONGEST_PIECE
        for left, right in _halves(token)
        if left in ids and right in ids
    ]
    found.sort(key=lambda merge: (merge[0], -len(merge[1]), -len(merge[2])))
    return [(left, right) for _, left, right in found]


def _halves(token: str) -> Iterator[tuple[str, str]]:
    return ((token[:place], token[place:]) for place in range(1, len(token)))


def _template(vocabulary: Vocabulary, *, bos: bool) -> _Json | None:
    """What is put around a text: BOS and EOS, where the file (or else llama.cpp) says so."""
    before = vocabulary.special("bos") if vocabulary.flag("add_bos_token", bos) else None
    after = vocabulary.special("eos") if vocabulary.flag("add_eos_token", False) else None
    if before is None and after is None:
        return None
    around = [[{"SpecialToken": {"id": token, "type_id": 0}}] if token else []
              for token in (before, after)]  # fmt: skip
    text = {name: {"Sequence": {"id": name, "type_id": 0}} for name in "AB"}
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    return {
        "type": "TemplateProcessing",
        "single": [*around[0], text["A"], *around[1]],
        "pair": [*around[0], text["A"], *around[1], *around[0], text["B"], *around[1]],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]}
            for token in (before, after)
            if token is not None
        },
    }
