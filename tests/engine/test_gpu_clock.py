"""A GPU's events on the host's clock: events that know when they passed, and real ones."""

import time

import pytest
import torch

from tierrun.engine.gpu import clock as module
from tierrun.engine.gpu.clock import CudaClock
from tierrun.io.timeline import EXPERTS, Timeline, between, moment

CUDA = torch.device("cuda")
FAR = 1234.5
"""Seconds by which the device's clock is ahead of the host's."""


class KnowingEvent:
    """Passes at once, on a clock of its own; is seen to have passed at the second look."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        type(self).made += 1

    def record(self, stream: object) -> None:
        self.looks, self.at = 0, time.perf_counter() + FAR

    def query(self) -> bool:
        self.looks += 1
        return self.looks > 1

    def elapsed_time(self, later: "KnowingEvent") -> float:
        return (later.at - self.at) * 1e3


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnowingEvent, "made", 0)
    monkeypatch.setattr(module, "_Event", KnowingEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


@pytest.mark.usefixtures("knowing")
def test_moments_are_times_of_the_host() -> None:
    with Timeline(CudaClock(CUDA)) as timeline:
        before = time.perf_counter()
        begun = moment()
        amidst = time.perf_counter()
        between(EXPERTS, "group", begun, moment())
        after = time.perf_counter()
    (found,) = timeline.spans
    wrong = timeline.error + 1e-9
    assert before - wrong <= found.start <= amidst + wrong
    assert amidst - wrong <= found.end <= after + wrong
    assert 0 < timeline.error < 0.1


@pytest.mark.usefixtures("knowing")
def test_events_are_made_beforehand_and_used_again() -> None:
    clock = CudaClock(CUDA, count=100)
    for spans in (20, 20, 50):
        with Timeline(clock) as timeline:
            for number in range(spans):
                between(EXPERTS, str(number), moment(), moment())
        assert [span.name for span in timeline.spans] == [str(n) for n in range(spans)]
        assert KnowingEvent.made == (100 if spans == 20 else 140)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_kernel_lies_between_its_launch_and_its_end() -> None:
    clock, big = CudaClock(CUDA, count=64), torch.ones(4096, 4096, device="cuda")
    for _ in range(2):  # the first product loads what it needs
        with Timeline(clock) as timeline:
            before = time.perf_counter()
            begun = moment()
            big @ big
            between(EXPERTS, "product", begun, moment())
            torch.cuda.synchronize()
            after = time.perf_counter()
    (found,) = timeline.spans
    wrong = timeline.error
    assert wrong < 1e-3
    assert before - wrong <= found.start < found.end <= after + wrong
