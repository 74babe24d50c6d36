"""Tiny tokenizers that split text as published ones do, under llama.cpp's name for the way."""

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)


def _words(letters: str, digits: str) -> str:
    return (
        rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*|"
        rf"{_REST}"
    )


SPLITS: dict[str, list[str]] = {
    "llama-bpe": [_words(r"\p{L}", r"\p{N}{1,3}")],
    "glm4": [_words(r"\p{L}", r"\p{N}{1,3}")],
    "qwen2": [_words(r"\p{L}", r"\p{N}")],
    "qwen35": [_words(r"\p{L}\p{M}", r"\p{N}")],
    "gpt-4o": [_CASED],
    "minimax-m2": [_CASED],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
        rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}",
    ],
    "deepseek-llm": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+"],
}
"""llama.cpp's name of a pre-tokenizer → the patterns that published models of it split by; the
others are GPT-2's."""

_TEXT = ["plain words and the other words that there are", "the answer", "hello there"] * 4

_SPECIAL = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>", "<|im_start|>", "<|im_end|>")

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZE = 290
"""The 256 bytes, special tokens, and some merges."""


def byte_level_tokenizer(pre: str) -> PreTrainedTokenizerFast:
    """GPT-2's kind of BPE, over text split as `pre` says."""
    tokenizer = Tokenizer.from_str(_train_byte_level(pre))
    return _fast(tokenizer, pad="<|pad|>", bos="<|bos|>", eos="<|eos|>", more=_SPECIAL)


@cache
def _train_byte_level(pre: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS.get(pre, ())]
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE,
        special_tokens=["<|pad|>", "<|bos|>", "<|eos|>", *_SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    text: str = tokenizer.to_str()
    return text


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Gemma's kind of BPE: a space is a letter, unknown letters are bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=50, show_progress=False))
    state = _model_state(trained)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *state]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=_merges(trained),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(
        tokenizer, pad="<pad>", bos="<bos>", eos="<eos>", more=("<|turn>", "<turn|>"), unk="<unk>"
    )


def _model_state(tokenizer: Tokenizer) -> list[str]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(first, second) for first, second in merges]


def _fast(
    tokenizer: Tokenizer,
    *,
    pad: str,
    bos: str,
    eos: str,
    more: tuple[str, ...],
    unk: str | None = None,
) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        extra_special_tokens=[AddedToken(token, special=True, normalized=False) for token in more],
    )
    fast.chat_template = _TEMPLATE
    return fast
