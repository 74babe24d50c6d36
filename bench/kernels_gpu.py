"""The GPU's kernels, launched as the engine launches them, and timed as recorded graphs.

A graph holds several calls, so that weights come from memory and not from a cache; the host's part
in launching is not measured. On the CPU (interpreted, in tests) calls are made one by one.
"""

from collections.abc import Callable

import torch
from torch import nn

from tierrun.bench.kernels_calls import Calls, Routed
from tierrun.bench.kernels_layers import Record
from tierrun.bench.timed import Work, repeated
from tierrun.engine.gpu.compute import ExpertCompute
from tierrun.engine.gpu.ops import DECODE_TOKENS
from tierrun.engine.kernels import matmul, matvec

_MOST_CALLS = 32
"""Of a graph."""

# torch does not annotate these.
_Stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream
_Event: Callable[..., torch.cuda.Event] = torch.cuda.Event


def kernel_of(tokens: int) -> str:
    """Which kernels the engine takes for so many."""
    return "matvec" if tokens <= DECODE_TOKENS else "matmul"


def gpu_calls(record: Record, records: torch.Tensor, tokens: int) -> tuple[Calls, int]:
    """A layer for so many tokens, and how many calls go once through all `records`, or nearly."""
    routed = Routed(record, records, tokens)
    count = max(1, min(_MOST_CALLS, len(records) // len(routed.experts)))
    made = _DecodeCalls if kernel_of(tokens) == "matvec" else _PrefillCalls
    return made(routed, record, records, count), count


class _DecodeCalls:
    """Up to 8 tokens: weights are read by every token that wants them."""

    def __init__(self, routed: Routed, record: Record, records: torch.Tensor, count: int) -> None:
        self.routed, self._records = routed, records
        self._x = routed.x.to(records.device)
        self.output = torch.empty(routed.output_shape, device=records.device)
        self._compute = None
        if record.layer.experts:
            self._compute = ExpertCompute(nn.Identity(), record.layout)
            each = (_offsets(routed, records, number)[routed.which] for number in range(count))
            self._slots = [slots.to(records.device) for slots in each]
        self._geometry = record.geometry

    def __call__(self, number: int) -> None:
        """See `Calls`."""
        if self._compute is not None:
            slots = self._slots[number]
            self._compute.decode(self._x, self._records.view(-1), slots, self.output)
            return
        data = self._records[self.routed.places(number)[0]]
        matvec.linear(self._x, data, self._geometry, out=self.output)


class _PrefillCalls:
    """Many tokens, sorted by expert."""

    def __init__(self, routed: Routed, record: Record, records: torch.Tensor, count: int) -> None:
        self.routed, self._record, self._records = routed, record, records
        self._x = routed.x.to(records.device)
        self.output = torch.empty(routed.output_shape, device=records.device)
        if record.layer.experts:
            experts = record.layer.experts
            self._grouping = matmul.group(routed.top_k.to(records.device), experts)
            self._tiles = self._grouping.tiles(range(experts))
            each = (_by_expert(routed, records, number, experts) for number in range(count))
            self._slots = [slots.to(records.device) for slots in each]

    def __call__(self, number: int) -> None:
        """See `Calls`."""
        if self._record.layer.experts:
            self._experts(self._slots[number])
            return
        data = self._records[self.routed.places(number)[0]]
        self.output = matmul.linear(self._x, data, self._record.geometry)

    def _experts(self, slots: torch.Tensor) -> None:
        (first,), down = self._record.layout.first, self._record.layout.down
        gate, grouping = self._record.layout.gate, self._grouping
        where = (grouping, self._tiles, self._records.view(-1), slots)
        x, h = matmul.arrange(self._x, first.matrix), matmul.hidden(grouping, down.matrix)
        matmul.gate_up(x, *where, first, gate, down.matrix, h)
        matmul.down(h, *where, down, self.output)


def _offsets(routed: Routed, records: torch.Tensor, number: int) -> torch.Tensor:
    """Where the records of call `number` begin, by the experts that are chosen."""
    return torch.tensor(routed.places(number)) * records.shape[1]


def _by_expert(routed: Routed, records: torch.Tensor, number: int, experts: int) -> torch.Tensor:
    """The same by all experts; 0 for those that nobody has chosen."""
    slots = torch.zeros(experts, dtype=torch.int64)
    slots[routed.experts] = _offsets(routed, records, number)
    return slots


def gpu_work(call: Callable[[int], object], count: int, device: torch.device) -> Work:
    """Calls 0 to `count` - 1 over and over; timed by events, `times` of them on average."""
    go = _recorded(call, count, device) if device.type == "cuda" else _called(call, count)

    def work(times: int) -> float:
        rounds = -(-times // count)
        return go(rounds) * times / (rounds * count)

    return work


def _called(call: Callable[[int], object], count: int) -> Work:
    return repeated(lambda: [call(number) for number in range(count)])


def _recorded(call: Callable[[int], object], count: int, device: torch.device) -> Work:
    stream = _Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call(0)  # compiles
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for number in range(count):
                call(number)

    def replay(rounds: int) -> float:
        begun, ended = _Event(enable_timing=True), _Event(enable_timing=True)
        with torch.cuda.stream(stream):
            begun.record(stream)
            for _ in range(rounds):
                graph.replay()
            ended.record(stream)
        ended.synchronize()
        milliseconds: float = begun.elapsed_time(ended)
        return milliseconds / 1000

    return replay
