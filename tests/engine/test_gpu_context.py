"""Contexts on the device take turns, and outlive a device that runs out of memory."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tierrun.engine.gpu.context import DeviceContext
from tierrun.io.errors import DeviceError


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


def context(runner: Any, given: list[int]) -> DeviceContext:
    def shrink(nbytes: int) -> int:
        return given.pop() if given else 0

    return DeviceContext(runner, 4, shrink)


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
    runner = FakeRunner()
    session = context(runner, [1] * 3)
    session.forward([1, 2, 3, 4, 5], last_only=True)
    runner.failures = failures
    assert session.forward([6], last_only=True) == 21.0
    assert runner.held == [1, 2, 3, 4, 5, 6]


def test_with_nothing_left_to_give_it_is_an_error_of_one_line() -> None:
    session = context(FakeRunner(failures=9), [1])
    with pytest.raises(DeviceError, match="out of memory: CUDA out of memory; lower -c") as caught:
        session.forward([1], last_only=True)
    assert "\n" not in str(caught.value)
