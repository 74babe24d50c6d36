"""Generated tokens as the caller sees them: one record each, with its text and its cost."""

from collections.abc import Iterator
from dataclasses import dataclass

from tierrun.engine.session import StepFigures
from tierrun.engine.text import TextStream


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One generated token: its id, the text it completed (often all of it, sometimes none) and
    what it cost. `finish` says why generation ended (`stop`, `length`), on the last record only."""

    id: int
    text: str
    figures: StepFigures
    finish: str | None = None


def token_records(
    steps: Iterator[tuple[int, StepFigures, bool]],
    text: TextStream | None,
    ends: frozenset[int],
) -> Iterator[TokenRecord]:
    """A record for each step (token, cost, whether it is the last), up to the answer's end."""
    for token, figures, last in steps:
        if token in ends:
            yield TokenRecord(token, text.finish() if text else "", figures, "stop")
            return
        piece = text.add(token) if text else ""
        if text and text.stopped:
            yield TokenRecord(token, piece, figures, "stop")
            return
        if last and text:
            piece += text.finish()
        yield TokenRecord(token, piece, figures, "length" if last else None)
