"""Text streams out as it is made: no half characters, nothing lost, stop strings kept back."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.bpe import byte_level_tokenizer, save_tokenizer, word_tokenizer
from transformers import PreTrainedTokenizerFast

from tierrun.engine.text import TextStream, encode, encode_chat, load_tokenizer
from tierrun.io.errors import UsageError

TOKENIZER = byte_level_tokenizer()
"""Byte-level BPE, as most models have: a character may be several tokens, a token several."""

AWKWARD = [
    "plain words, twice: plain words",
    "naïve café — “quoted” …",
    "emoji 🙂🙃 and families 👩‍👩‍👧‍👦 and flags 🇩🇪",
    "漢字かな交じり文",
    "  leading and trailing  ",
    "tabs\tand\n\nnewlines\r\n",
    "\ufffd the replacement character itself \ufffd",
    "",
]


def stream(ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """The pieces for each token (up to a stop string), and one for the end."""
    text, pieces = TextStream(TOKENIZER, stop), []
    for token in ids:
        pieces.append(text.add(token))
        if text.stopped:
            return pieces, text
    return [*pieces, text.finish()], text


def tokens_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text)["input_ids"]
    return ids


texts = st.text() | st.text(alphabet="aé漢🙂 the\n") | st.sampled_from(AWKWARD)


@given(texts)
@settings(max_examples=200)
def test_pieces_joined_are_the_whole_text(text: str) -> None:
    ids = tokens_of(text)
    pieces, _ = stream(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids) == text


@given(texts.filter(lambda text: "\ufffd" not in text))
def test_no_piece_has_half_a_character(text: str) -> None:
    pieces, _ = stream(tokens_of(text))
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_comes_with_its_last_token() -> None:
    ids = tokens_of("a🙂b")
    assert len(ids) > 3, "an emoji is several tokens here"
    pieces, _ = stream(ids)
    assert pieces[0] == "a" and "🙂" in pieces
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=14))
@settings(max_examples=200)
def test_any_tokens_give_what_they_decode_to(ids: list[int]) -> None:
    """Bytes that are no text come out as replacement characters, at the end at the latest."""
    pieces, _ = stream(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_bytes_that_never_become_text_do_not_hold_it_back_for_ever() -> None:
    (lone,) = [t for t in range(TOKENIZER.vocab_size) if TOKENIZER.convert_ids_to_tokens(t) == "Ģ"]
    text = TextStream(TOKENIZER)
    assert any(text.add(lone) for _ in range(40))


def test_special_tokens_are_silent() -> None:
    ids = [*tokens_of("a"), TOKENIZER.eos_token_id, *tokens_of("b")]
    assert "".join(stream(ids)[0]) == "ab"


@given(
    st.lists(st.sampled_from(["the", "answer", "other", "hello"]), min_size=2, max_size=12),
    st.integers(1, 20),
)
def test_an_answer_goes_on_where_its_prompt_ends(words: list[str], split: int) -> None:
    """Also where a tokenizer drops the space before the first word of what it decodes."""
    tokenizer = word_tokenizer()
    ids = tokenizer(" ".join(words))["input_ids"]
    prompt, answer = ids[:split], ids[split:]
    text = TextStream(tokenizer, (), prompt)
    joined = "".join([*map(text.add, answer), text.finish()])
    assert tokenizer.decode(prompt) + joined == " ".join(words)


# -- stop strings -------------------------------------------------------------------------------


@given(
    text=texts,
    stop=st.lists(st.text(alphabet="aeé漢🙂 th\n", min_size=1, max_size=4), max_size=3),
    place=st.integers(0, 40),
    length=st.integers(1, 6),
)
@settings(max_examples=300)
def test_text_ends_where_a_stop_string_begins(
    text: str, stop: list[str], place: int, length: int
) -> None:
    """However its characters are split over tokens; what only looked like one is not lost."""
    stop = [*stop, *filter(None, [text[place : place + length]])]
    pieces, stream_ = stream(tokens_of(text), stop)
    joined = "".join(pieces)
    assert stream_.stopped == any(one in text for one in stop)
    if stream_.stopped:
        assert text.startswith(joined) and not any(one in joined for one in stop)
        assert text[len(joined) :].startswith(tuple(stop))
    else:
        assert joined == text


def test_a_stop_string_is_kept_back_token_by_token() -> None:
    text = TextStream(TOKENIZER, ["###"])
    seen = "".join(text.add(token) for token in tokens_of("answer##"))
    assert seen == "answer", "the beginning of a stop string waits"
    assert text.add(tokens_of("x")[0]) == "##x", "and comes once it is none"


def test_an_empty_stop_string_stops_nothing() -> None:
    pieces, stream_ = stream(tokens_of("some text"), [""])
    assert "".join(pieces) == "some text" and not stream_.stopped


# -- prompts ------------------------------------------------------------------------------------


def test_a_directory_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(UsageError, match="no tokenizer"):
        encode(None, "text")


def test_a_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None and encode(loaded, "some text") == tokens_of("some text")


MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def test_a_conversation_follows_the_chat_template() -> None:
    tokenizer: PreTrainedTokenizerFast = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    wanted = "[user]hello[assistant]hi[assistant]"
    assert tokenizer.decode(encode_chat(tokenizer, MESSAGES)) == wanted


def test_a_conversation_without_template_is_its_text() -> None:
    assert TOKENIZER.decode(encode_chat(TOKENIZER, MESSAGES)) == "hellohi"
