"""Tokens and their text, from steps to records."""

import pytest
from tests.engine.bpe import byte_level_tokenizer

from tierrun.engine.session import StepFigures
from tierrun.engine.text import TextStream
from tierrun.engine.tokens import TokenRecord, token_records
from tierrun.tiers.ledger import Counters

TOKENIZER = byte_level_tokenizer()
END: int = TOKENIZER.eos_token_id


def records(
    text: str, cut: int = 0, stop: tuple[str, ...] = (), end: bool = False
) -> list[TokenRecord]:
    """What becomes of the tokens of `text` without the last `cut`, perhaps with an end token."""
    ids = TOKENIZER(text)["input_ids"]
    ids = ids[: len(ids) - cut] + [END, ids[0]] * end
    steps = ((id_, StepFigures(0.0, Counters()), i + 1 == len(ids)) for i, id_ in enumerate(ids))
    return list(token_records(steps, TextStream(TOKENIZER, stop), frozenset([END])))


def whole(found: list[TokenRecord]) -> str:
    return "".join(record.text for record in found)


def test_the_last_record_has_the_text_that_was_still_held_back() -> None:
    """Half a character, and what only looked like the beginning of a stop string."""
    assert whole(records("a🙂", cut=1)).startswith("a\ufffd")
    assert whole(records("a##", stop=("###",))) == "a##"


def test_an_end_token_brings_what_was_held_back_and_no_text_of_its_own() -> None:
    found = records("a##", stop=("###",), end=True)
    assert whole(found) == "a##"
    assert (found[-1].id, found[-1].finish) == (END, "stop")


@pytest.mark.parametrize(
    ("text", "stop", "end", "finish"),
    [
        ("some text", (), False, "length"),
        ("some text", (), True, "stop"),
        ("some text, and more", ("xt",), False, "stop"),
        ("some text", ("xt",), False, "stop"),
    ],
    ids=["length", "end token", "stop string", "stop string in the last token"],
)
def test_the_last_record_alone_says_why_it_is_the_last(
    text: str, stop: tuple[str, ...], end: bool, finish: str
) -> None:
    found = records(text, stop=stop, end=end)
    assert [record.finish for record in found] == [None] * (len(found) - 1) + [finish]
    assert whole(found) == (text[: text.index("xt")] if stop else text)
