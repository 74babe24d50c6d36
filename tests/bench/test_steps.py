"""What a long run shows: a bar with the time left on a terminal, a line per step elsewhere."""

import io

import pytest
from rich.console import Console

from tierrun.bench import steps
from tierrun.bench.steps import Forecast, in_time, open_steps


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_is_by_what_it_took() -> None:
    clock = Clock()
    forecast = Forecast(10.0, clock)
    assert forecast.left() == "" and forecast.share == 0.0
    clock.now += 8
    forecast.end(2.0)  # four times as long as foreseen
    assert forecast.share == pytest.approx(0.2)
    assert forecast.left() == "about 32 s left"
    clock.now += 12  # the next is under way
    assert forecast.left() == "about 20 s left"
    clock.now += 100
    assert forecast.left() == "about 0 s left"
    forecast.end(8.0)
    assert forecast.share == 1.0 and forecast.left() == "about 0 s left"


def test_times_in_words() -> None:
    assert [in_time(t) for t in (0.2, 99, 100, 420)] == [
        *("about 0 s", "about 99 s", "about 2 min", "about 7 min")
    ]


def test_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_steps(Console(file=io.StringIO())) as shown:
        for done in range(1000):
            shown.begin(f"writing {done}")
        shown.expect(4.0)
        shown.end("one: 2.31 GB/s", 2.0)
        shown.begin("two")
        shown.end("two: 2.11 GB/s", 2.0)
        monkeypatch.setattr(steps, "_SELDOM_SECONDS", 0.0)
        shown.begin("a long three")
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert [line.partition(";")[0] for line in lines] == [
        *("one: 2.31 GB/s", "two: 2.11 GB/s", "a long three")
    ]
    assert lines[0].endswith(" left")


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    with open_steps(console) as shown:
        shown.begin("writing [a file]")
        shown.expect(4.0)
        shown.end("one: 2.31 GB/s", 1.0)
        shown.begin("two [of them]")
    assert "two [of them]" in file.getvalue().rpartition("about 0 s left")[2]
    assert capsys.readouterr().err == ""
