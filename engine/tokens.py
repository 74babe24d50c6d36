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
        piece = text.add(token) if text and token not in ends else ""
        if text and (last or token in ends):
            piece += text.finish()
        stopped = token in ends or bool(text and text.stopped)
        finish = "stop" if stopped else "length" if last else None
        yield TokenRecord(token, piece, figures, finish)
        if finish:
            return
