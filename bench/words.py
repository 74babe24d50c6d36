"""Words of a command line that several benchmarks understand, and how long their rounds last."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from tierrun.io.errors import UsageError

T = TypeVar("T")


def each(text: str | None, parse: Callable[[str], T]) -> tuple[T, ...] | None:
    """The words of a list, each once; None where there is no list."""
    if text is None:
        return None
    return tuple(dict.fromkeys(parse(word.strip()) for word in text.split(",")))


def known(flag: str, name: str, names: Iterable[str]) -> str:
    """Raises UsageError: `name` is none of `names`."""
    if name not in names:
        raise UsageError(f"{flag} {name}: choose from {', '.join(names)}")
    return name


def thread_count(text: str) -> int:
    """Raises UsageError: not a number of threads that this process has cores for."""
    cores = num_cores()
    if not text.isdecimal() or not 1 <= int(text) <= cores:
        raise UsageError(
            f"--threads {text!r}: write numbers from 1 to {cores}, the cores there are"
        )
    return int(text)


def checked_duration(seconds: float | None) -> float | None:
    """Raises UsageError: no time at all."""
    if seconds is not None and not seconds > 0:
        raise UsageError(f"--duration {seconds:g}: give some time, such as 1")
    return seconds


def fair_seconds(num_goes: int, budget: float, shortest: float, longest: float) -> float:
    """What each of so many goes may last, between two limits, so that all take `budget` seconds."""
    return max(shortest, min(longest, round(budget / max(1, num_goes), 2)))


def left_out_notes(counts: Mapping[str, int]) -> Iterator[str]:
    """Reason → how many cells it has left out, in words."""
    for reason, count in counts.items():
        yield f"left out ({count} {'cell' if count == 1 else 'cells'}): {reason}"


def swept(most: int) -> list[int]:
    """1, 2, 4 … and `most` threads."""
    return sorted({1 << i for i in range(most.bit_length())} | {most})


def num_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0))
