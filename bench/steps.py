"""What a long run is doing: on a terminal a bar with the time that is left, elsewhere lines."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from tierrun.bench.running import say

_SELDOM_SECONDS = 10.0
"""Between two lines about what is under way."""


class Steps(Protocol):
    """Shows a run: its steps are foreseen to take so many seconds, each and together."""

    def expect(self, seconds: float) -> None:
        """Steps begin, which will take so long altogether."""

    def begin(self, text: str) -> None:
        """This is under way: a step, a part of one, or something before them; from any thread."""

    def end(self, text: str, seconds: float) -> None:
        """A step has ended that was to take so long: what it was, and what it found."""


class Forecast:
    """How long steps will still take, by how long those until now took against what was foreseen.

    Before the first has ended, nobody knows.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._whole, self._done, self._clock = seconds, 0.0, clock
        self._began = self._ended = clock()

    def end(self, seconds: float) -> None:
        """A step is done."""
        self._done, self._ended = self._done + seconds, self._clock()

    @property
    def share(self) -> float:
        """Of all that is done, 0 … 1."""
        return min(1.0, self._done / self._whole) if self._whole > 0 else 1.0

    def left(self) -> str:
        """In words, and nothing while nobody knows."""
        if not self._done:
            return ""
        took = self._ended - self._began
        seconds = took * (1 / self.share - 1) - (self._clock() - self._ended)
        return in_time(max(0.0, seconds)) + " left"


def in_time(seconds: float) -> str:
    """`about 40 s`, `about 7 min`."""
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"


@contextmanager
def open_steps(console: Console | None = None) -> Iterator[Steps]:
    """On stderr, or on `console`."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    left, what = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis")
    columns = (
        BarColumn(20),
        _Left(table_column=left),
        TextColumn("{task.description}", markup=False, table_column=what),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        yield _Bar(shown)


class _Left(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        forecast: Forecast | None = task.fields["forecast"]
        return Text("" if forecast is None else forecast.left())


class _Bar:
    """See `Steps`. It fills by what was foreseen."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._forecast: Forecast | None = None
        self._task = shown.add_task("", total=None, forecast=None)

    def expect(self, seconds: float) -> None:
        self._forecast = Forecast(seconds)
        self._shown.update(self._task, total=1.0, forecast=self._forecast)

    def begin(self, text: str) -> None:
        self._shown.update(self._task, description=text)

    def end(self, text: str, seconds: float) -> None:
        assert self._forecast is not None
        self._forecast.end(seconds)
        self._shown.update(self._task, completed=self._forecast.share)


class _Lines:
    """See `Steps`. A line for each step when it has ended; of what is under way only seldom one,
    so that what ends at once, or is refused, has none."""

    def __init__(self) -> None:
        self._forecast = Forecast(0.0)
        self._said = time.monotonic()

    def expect(self, seconds: float) -> None:
        self._forecast = Forecast(seconds)

    def begin(self, text: str) -> None:
        if time.monotonic() - self._said >= _SELDOM_SECONDS:
            self._line(text)

    def end(self, text: str, seconds: float) -> None:
        self._forecast.end(seconds)
        self._line(f"{text}; {self._forecast.left()}")

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        say(text)
