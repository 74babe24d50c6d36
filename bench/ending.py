"""SIGTERM and SIGHUP end a benchmark as an error does: what it has started is stopped first.

What has been measured until then, or until Ctrl-C, is delivered nevertheless.
"""

import signal
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

from tierrun.bench.cells import Results
from tierrun.bench.sheets import Sheet

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Outcome(NamedTuple):
    """The results, how to show them, and what ended the run early, if anything did."""

    results: Results
    sheets: list[Sheet]
    ended: BaseException | None


@dataclass(slots=True)
class Ending:
    """What ended a run early, if anything did."""

    by: BaseException | None = None


@contextmanager
def delivering(found: Sized) -> Iterator[Ending]:
    """Who is told to end within it leaves it as if all were done, and the `Ending` says by what;
    but not while nothing is `found`."""
    ending = Ending()
    try:
        yield ending
    except (KeyboardInterrupt, SystemExit) as ended:
        if not found:
            raise
        ending.by = ended


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it they raise SystemExit with the exit code that a shell gives to who dies of them.

    Assumes: the main thread.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
