"""Recorded segments: their order, and what a timeline says of them. Graphs are fakes."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from tests.clocks import CountingClock

from tierrun.engine.gpu.graphs import SegmentedGraph
from tierrun.io.timeline import SEGMENTS, Timeline

done: list[str] = []
current: list["FakeGraph"] = []


class FakeGraph:
    """Records what is called while it is open, and calls it again."""

    def __init__(self) -> None:
        self.work: list[str] = []

    def capture_begin(self, **_: object) -> None:
        current.append(self)

    def capture_end(self) -> None:
        current.pop()

    def replay(self) -> None:
        done.extend(self.work)


class FakeStream:
    def wait_stream(self, other: object) -> None:
        pass


def launch(name: str) -> None:
    current[-1].work.append(name)


def serve(late: Callable[[], None], join: Callable[[], None]) -> None:
    done.append("serve")
    late()
    late()
    join()


def ignore(late: Callable[[], None], join: Callable[[], None]) -> None:
    done.append("ignore")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> SegmentedGraph:
    """Two layers; what the first has beside it is wanted, the second's is not."""
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": nullcontext,
        "graph_pool_handle": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    done.clear()
    graph = SegmentedGraph()

    def forward() -> torch.Tensor:
        for number, step in enumerate((serve, ignore)):
            launch(f"layer {number}")
            late, join = (lambda: launch("late"), lambda: launch("join"))
            graph.cut(step, late=late, join=join)
        launch("head")
        return torch.zeros(1)

    graph.record(forward)
    assert done == [], "recorded, not executed"
    return graph


ORDER = ["layer 0", "serve", "late", "late", "join", "layer 1", "ignore", "head"]


def test_replay_is_graph_host_graph(recorded: SegmentedGraph) -> None:
    recorded.replay()
    assert done == ORDER and recorded.num_segments == 3


def test_segments_and_works_beside_are_on_the_timeline(recorded: SegmentedGraph) -> None:
    with Timeline(CountingClock()) as timeline:
        recorded.replay()
    recorded.replay()
    assert done == 2 * ORDER
    names = [span.name for span in timeline.spans]
    beside = ["segment 0: late", "segment 0: late", "segment 0: join"]
    assert names == ["first segment", *beside, "segment 1", "last segment"]
    assert {span.track for span in timeline.spans} == {SEGMENTS}
    ends = [(span.start, span.end) for span in timeline.spans]
    assert ends == [(101 + 2 * n, 102 + 2 * n) for n in range(6)]
