"""Contexts on the device take turns, and outlive a device that runs out of memory."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from tierrun.engine.gpu.context import DeviceContext
from tierrun.io.errors import BudgetError, DeviceError


class FakeRunner:
    """Remembers the tokens of the one cache; runs out of memory `failures` times."""

    def __init__(self, failures: int = 0) -> None:
        self.owner: object | None = None
        self.cache, self.held, self.failures = self, list[int](), failures

    def reset(self) -> None:
        self.held = []

    def forward(self, tokens: Sequence[int], *, last_only: bool) -> torch.Tensor:
        if self.failures:
            self.failures -= 1
            self.held.append(-1)  # half done
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More.")
        self.held += tokens
        return torch.tensor([float(sum(self.held))])


class FakeRoom:
    """Room for `most` tokens; gives back what is in `given`, one after another."""

    def __init__(self, given: list[int], most: int = 100) -> None:
        self.given, self.most = given, most
        self.wanted: list[int] = []
        self.longest, self.shrinks = 0, False

    def grow_to(self, length: int) -> None:
        if length > self.most:
            raise BudgetError("too long")
        self.longest = max(self.longest, length)

    def shrink_to(self, length: int) -> bool:
        return self.shrinks

    def relieve(self, nbytes: int, length: int) -> int:
        self.wanted.append(nbytes)
        return self.given.pop() if self.given else 0


def context(runner: Any, given: list[int]) -> DeviceContext:
    room: Any = FakeRoom(given)
    return DeviceContext(runner, 4, room)


def test_one_that_comes_back_computes_its_past_again() -> None:
    runner = FakeRunner()
    first, second = context(runner, []), context(runner, [])
    first.forward([1, 2, 3, 4, 5], last_only=True)
    second.forward([10], last_only=True)
    assert first.forward([6], last_only=True) == 21.0
    assert runner.held == [1, 2, 3, 4, 5, 6]
    first.reset()
    assert first.forward([7], last_only=True) == 7.0


@pytest.mark.parametrize("failures", [1, 3])
def test_memory_that_runs_out_is_given_back_and_the_pass_made_again(failures: int) -> None:
    runner, room = FakeRunner(), FakeRoom([1] * 3)
    session = DeviceContext(*cast(Any, (runner, 4, room)))
    session.forward([1, 2, 3, 4, 5], last_only=True)
    runner.failures = failures
    assert session.forward([6], last_only=True) == 21.0
    assert runner.held == [1, 2, 3, 4, 5, 6]
    assert room.wanted == [256 << 20 << n for n in range(failures)]


def test_what_does_not_fit_is_refused_and_the_context_goes_on() -> None:
    runner, room = FakeRunner(), FakeRoom([], most=6)
    session = DeviceContext(*cast(Any, (runner, 4, room)))
    session.forward([1, 2, 3, 4, 5], last_only=True)
    with pytest.raises(BudgetError):
        session.reserve(7, kept=5)
    session.reserve(6, kept=5)
    assert session.forward([6], last_only=True) == 21.0 and room.longest == 6


def test_a_context_whose_memory_went_to_the_experts_computes_its_past_again() -> None:
    runner, room = FakeRunner(), FakeRoom([])
    first, second = (DeviceContext(*cast(Any, (runner, 4, room))) for _ in range(2))
    first.forward([1, 2, 3], last_only=True)
    room.shrinks = True
    first.reserve(4, kept=3)
    assert runner.owner is first, "it goes on: nothing is taken from it"
    second.reserve(1, kept=0)
    assert runner.owner is None
    assert first.forward([4], last_only=True) == 10.0
    assert runner.held == [1, 2, 3, 4]


def test_with_nothing_left_to_give_it_is_an_error_of_one_line() -> None:
    session = context(FakeRunner(failures=9), [1])
    with pytest.raises(DeviceError, match="out of memory: CUDA out of memory; lower -c") as caught:
        session.forward([1], last_only=True)
    assert "\n" not in str(caught.value)
