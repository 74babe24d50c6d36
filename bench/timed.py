"""How often something can be done in a second, measured for a while and in rounds."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Work = Callable[[int], float]
"""Does something so many times over; the seconds that all of it took."""

Say = Callable[[str], None]
"""Shows what is being done."""

T = TypeVar("T")

_MOST_TIMES = 1 << 20


def rate(work: Work, seconds: float) -> float:
    """Times per second, of `work` done for about `seconds`; at least once.

    A first time warms up. Then `work` is done more and more often, until that lasts half of
    `seconds` (with what `work` does not count as its own): only this last go counts.
    """
    work(1)
    times = 1
    while True:
        began = time.perf_counter()
        took = work(times)
        lasted = time.perf_counter() - began
        if lasted >= seconds / 2 or times >= _MOST_TIMES:
            return times / took
        times = min(_MOST_TIMES, _enough(times, lasted, seconds))


def _enough(times: int, lasted: float, seconds: float) -> int:
    """How often to do next what lasted so long; at most 16 times as often, as a guess from very
    little is a bad one."""
    return max(2 * times, min(16 * times, int(times * 0.8 * seconds / max(lasted, 1e-9))))


def repeated(call: Callable[[], object]) -> Work:
    """`call`, timed by the clock on the wall."""

    def work(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - began

    return work


def in_turns(
    cases: Sequence[T], measure: Callable[[T], float], rounds: int, say: Callable[[int, T], None]
) -> list[tuple[float, ...]]:
    """A sample per round of each of `cases`: all of them once, then all of them again."""
    samples = [list[float]() for _ in cases]
    for number in range(rounds):
        for case, found in zip(cases, samples, strict=True):
            say(number, case)
            found.append(measure(case))
    return [tuple(found) for found in samples]
