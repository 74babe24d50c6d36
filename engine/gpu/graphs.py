"""A forward pass as CUDA graphs in segments, one per stretch between two experts calls.

While a pass is recorded, the experts call *cuts*: the graph under way ends there, what the host has
to do at that place is noted, and the next graph begins. The model's own forward runs once,
unmodified, and falls apart by itself; replay is graph, host, graph, host, … graph. No code knows an
architecture. Work that the host step may want of the device, any number of times or never, is
recorded as a small graph of its own, beside: replaying it costs microseconds, launching it ten
times as much.

Assumes: everything between two cuts is the same work on the same memory for every token, and takes
no decision on values of the device. All graphs share one memory pool and are replayed in the order
in which they were recorded, so memory that one of them leaves to a later one still holds its
values when that one runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tierrun.io.timeline import SEGMENTS, between, moment

Work = Callable[[], None]
HostStep = Callable[..., None]
"""What the host does between two graphs; given what enqueues each work recorded beside, by name."""


class _Graph(NamedTuple):
    """A graph, and what it is called on a timeline."""

    graph: torch.cuda.CUDAGraph
    name: str

    def replay(self) -> None:
        """Enqueue it on the current stream."""
        begun = moment()
        self.graph.replay()
        between(SEGMENTS, self.name, begun, moment())


class SegmentedGraph:
    """One recorded forward pass."""

    def __init__(self) -> None:
        self._graphs: list[_Graph] = []
        self._steps: list[HostStep] = []
        self._beside: list[dict[str, Work]] = []
        self._open: torch.cuda.CUDAGraph | None = None
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def num_segments(self) -> int:
        return len(self._graphs)

    def record(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `forward` once without executing it; what it returns is filled by every replay.

        Raises:
            RuntimeError: `forward` does something that a graph cannot hold; nothing is left behind.
        """
        make: Callable[[], torch.cuda.Stream] = torch.cuda.Stream
        stream = make()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._begin()
            try:
                output = forward()
            except BaseException:
                self._abandon()
                raise
            self._graphs.append(self._end("last segment"))
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def cut(self, step: HostStep, **beside: Work) -> None:
        """End the graph under way, let `step` follow it, begin the next; record what is beside."""
        number = len(self._graphs)
        name = f"segment {number}" if number else "first segment"
        self._graphs.append(self._end(name))
        self._steps.append(step)
        works = beside.items()
        recorded = {kind: self._recorded(work, f"segment {number}: {kind}") for kind, work in works}
        self._beside.append({kind: graph.replay for kind, graph in recorded.items()})
        self._begin()

    def replay(self) -> None:
        """The whole pass, on the current stream."""
        for graph, step, beside in zip(self._graphs, self._steps, self._beside, strict=False):
            graph.replay()
            step(**beside)
        self._graphs[-1].replay()

    def _recorded(self, work: Work, name: str) -> _Graph:
        self._begin()
        work()
        return self._end(name)

    def _begin(self) -> None:
        self._open = torch.cuda.CUDAGraph()
        # Other threads (reads, copies, pinning) may call CUDA meanwhile: only this one is captured.
        self._open.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self, name: str) -> _Graph:
        graph, self._open = self._open, None
        assert graph is not None, "no graph is being recorded"
        graph.capture_end()
        return _Graph(graph, name)

    def _abandon(self) -> None:
        """End a capture that failed; the first error is the one that says why."""
        try:
            if self._open is not None:
                self._end("never replayed")
        except RuntimeError:
            pass
        self._graphs.clear()
        self._beside.clear()
        self._steps.clear()


def graph_seconds(work: Work, rounds: int) -> list[float]:
    """What the device takes for `work`, several times, without the host's part in it."""
    work()  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    return [_replay_seconds(graph) for _ in range(rounds)]


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    make: Callable[..., torch.cuda.Event] = torch.cuda.Event
    begun, ended = make(enable_timing=True), make(enable_timing=True)
    begun.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    milliseconds: float = begun.elapsed_time(ended)
    return milliseconds / 1000
