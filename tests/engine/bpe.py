"""Two small tokenizers, trained on the spot."""

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
"""The 256 bytes, two special tokens, and some merges."""

_TEXT = ["plain words and the other words that there are", "the answer", "hello there"] * 4


@cache
def _train() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    text: str = tokenizer.to_str()
    return text


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh one, so that a test may change it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_train()), bos_token="<s>", eos_token="</s>"
    )


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece's: a word carries its space, the text's first word loses it on decoding."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def save_tokenizer(directory: Path) -> None:
    byte_level_tokenizer().save_pretrained(directory)
