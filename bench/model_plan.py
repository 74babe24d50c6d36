"""What `tierrun bench model` measures: llama-bench's tests, under each pair of budgets.

`-p 512 -n 128 -d 0,4096` are the tests pp512, tg128, pp512 @ d4096 and tg128 @ d4096: a prompt of
512 tokens, or 128 tokens one by one, behind a context of so many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from tierrun.io.errors import UsageError

SETTLING = 2
"""Tokens that a GPU generates before the clock starts: at the first behind a context the room for
it may grow, and graphs are recorded anew."""


class Case(NamedTuple):
    """A test; `kind` is `pp` (a prompt) or `tg` (text generation)."""

    kind: str
    tokens: int
    depth: int

    @property
    def name(self) -> str:
        """As llama-bench writes it."""
        behind = f" @ d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.tokens}{behind}"

    @property
    def end(self) -> int:
        """Tokens of context that it needs."""
        return self.depth + SETTLING + self.tokens


class Budgets(NamedTuple):
    """As the command line has them."""

    vram: str
    ram: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All tests under all budgets; `learn` tokens are decoded before them, unmeasured."""

    tests: tuple[Case, ...]
    budgets: tuple[Budgets, ...]
    repetitions: int = 5
    learn: int = 128
    warm: bool = True
    seconds: float | None = None

    @staticmethod
    def of(
        prompts: str,
        generated: str,
        depths: str,
        vram: str,
        ram: str,
        repetitions: int,
        learn: int,
        warm: bool,
        seconds: float | None,
    ) -> "Plan":
        """From the words of a command line.

        Raises:
            UsageError: one that is not understood, or no test at all.
        """
        kinds = (("pp", _numbers("-p", prompts)), ("tg", _numbers("-n", generated)))
        tests = tuple(
            Case(kind, tokens, depth)
            for depth in _numbers("-d", depths)
            for kind, counts in kinds
            for tokens in counts
            if tokens
        )
        if not tests:
            raise UsageError("-p 0 -n 0: no test is left")
        if seconds is not None and seconds <= 0:
            raise UsageError(f"--duration {seconds:g}: give some time, such as 10")
        budgets = product(_words("--vram", vram), _words("--ram", ram))
        return Plan(
            tests,
            tuple(Budgets(*pair) for pair in budgets),
            repetitions,
            learn if warm else 0,
            warm,
            seconds,
        )

    @property
    def context(self) -> int:
        """The longest context, that of learning included."""
        return max(*(test.end for test in self.tests), self.learn + SETTLING)

    @property
    def stream(self) -> int:
        """Tokens of the stream that every pair of budgets is fed: each repetition its own."""
        measured = sum((1 + self.repetitions) * (SETTLING + test.tokens) for test in self.tests)
        return max(test.depth for test in self.tests) + self.learn + measured + 2


def _words(flag: str, text: str) -> Sequence[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if not all(words):
        raise UsageError(f"{flag} {text!r}: write values with commas between, like 4GiB,8GiB")
    return words


def _numbers(flag: str, text: str) -> list[int]:
    words = _words(flag, text)
    odd = next((word for word in words if not word.isdecimal()), None)
    if odd is not None:
        raise UsageError(f"{flag} {text}: write numbers of tokens, like 512,2048")
    return [int(word) for word in words]
