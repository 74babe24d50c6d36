"""Between text and tokens: prompts, chat templates, and text that streams as it is made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tierrun.io.errors import StoreError, UsageError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_UNFINISHED = "\ufffd"
"""What a decoder puts where the bytes of a character are not all there yet."""

_CONTEXT_TOKENS = 8
_MOST_HELD_TOKENS = 16
"""A character has four bytes at most; beyond this the bytes are simply not text."""


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a store, or None where the checkpoint had none.

    Raises:
        StoreError: its files are damaged.
    """
    if not any((model_dir / name).is_file() for name in _TOKENIZER_FILES):
        return None
    load: Any = AutoTokenizer.from_pretrained
    try:
        tokenizer: PreTrainedTokenizerBase = load(model_dir)
    except Exception as error:  # whatever a parser raises on a damaged file
        raise StoreError(
            f"{model_dir}: the tokenizer cannot be loaded ({error!r}); convert the model again"
        ) from error
    return tokenizer


class TextStream:
    """Turns token ids into text piece by piece; never emits half a character.

    Text that could be the beginning of a stop string is held back until it is known not to be.
    `prompt` are the ids before the first token: whether that begins with a space depends on them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._start = 0
        self._done = len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that `token` completes, possibly none."""
        self._ids.append(token)
        return self._release(self._decode_new(last=False))

    def finish(self) -> str:
        """What was still held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._held + self._decode_new(last=True)
        self._held = ""
        return self._cut(text)

    def _decode_new(self, *, last: bool) -> str:
        """The text of the tokens since the last piece, decoded with the piece before it.

        A few tokens of context make spaces and merges come out as in the whole text.
        """
        before = self._decode(self._ids[self._start : self._done])
        text = self._decode(self._ids[self._start :])
        pending = len(self._ids) - self._done
        if text.endswith(_UNFINISHED) and not last and pending < _MOST_HELD_TOKENS:
            return ""
        if len(text) > len(before):  # a token without text is no context for the next one
            self._start = self._done
        self._done = len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _release(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._held + new
        whole = self._cut(text)
        if self.stopped:
            self._held = ""
            return whole
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _cut(self, text: str) -> str:
        """`text` up to the first stop string."""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = self.stopped or bool(places)
        return text[: min(places)] if places else text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: str) -> list[int]:
    """Token ids of raw text.

    Raises:
        UsageError: the store has no tokenizer.
    """
    if tokenizer is None:
        raise UsageError("this store has no tokenizer, so text cannot be read; pass token ids")
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids


def encode_chat(
    tokenizer: PreTrainedTokenizerBase | None, messages: list[dict[str, str]]
) -> list[int]:
    """Token ids of a conversation, by the chat template; plain continuation where there is none."""
    if tokenizer is None or not tokenizer.chat_template:
        return encode(tokenizer, "".join(message["content"] for message in messages))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
