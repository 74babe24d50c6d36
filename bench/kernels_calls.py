"""One layer's products as calls, each with weights that lie at other places than the last's."""

from typing import Protocol

import torch

from tierrun.bench.kernels_layers import Record, choose


class Calls(Protocol):
    """A way of computing a layer for some tokens."""

    routed: "Routed"
    output: torch.Tensor
    """Of the last call, unweighted: fp32 [tokens · top-k, out]."""

    def __call__(self, number: int) -> None:
        """Do call `number`, or enqueue it on the device's current stream."""


class Routed:
    """Tokens, what they choose, and which of `records` (uint8 [n, bytes]) serve a call.

    `experts` are those that some token has chosen, ascending; `which` [tokens · top-k] says of
    each assignment which of these it is. One matrix is one expert, which every token takes.
    """

    def __init__(self, record: Record, records: torch.Tensor, tokens: int) -> None:
        layer = record.layer
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(tokens, layer.hidden, generator=random)
        self.top_k = choose(layer, tokens)
        self.experts, which = torch.unique(self.top_k, return_inverse=True)
        self.which = which.flatten()
        self.read_bytes = len(self.experts) * record.packed_bytes
        """Of packed weights that a call needs, each counted once."""
        self.weights = len(self.experts) * layer.weights
        self.flops = layer.flops(tokens)
        self.output_shape = (len(self.which), layer.shapes[-1][0])
        self._num_records = len(records)

    def places(self, number: int) -> list[int]:
        """By `experts`, the records of call `number`: those after the last call's, round and
        round."""
        first = number * len(self.experts)
        return [(first + i) % self._num_records for i in range(len(self.experts))]
