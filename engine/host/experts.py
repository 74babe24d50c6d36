"""A token's experts where they lie: without a lease where all are in RAM, else beside their reads.

Without a lease nothing else runs on the model's thread meanwhile but the look-ahead, which spares
them. What was used is written into a journal, and the books are kept once per token, or before
anything else looks at them.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.engine.compiled import CompiledExperts
from tierrun.engine.kernels.host import HostExperts
from tierrun.engine.kernels.token_experts import BEGAN, ENDED, USED, Scratch, TokenExperts
from tierrun.engine.lookahead import Lookahead
from tierrun.tiers.ledger import LayerTiming, Ledger
from tierrun.tiers.present import Present
from tierrun.tiers.residency import Lease, Residency

_NOBODY = -1
_NANO = 1e-9


class PresentExperts:
    """Those of one model; `usage` are its counts by layer."""

    def __init__(
        self,
        compiled: CompiledExperts,
        residency: Residency,
        ledger: Ledger,
        usage: list[torch.Tensor],
        lookahead: Lookahead | None,
    ) -> None:
        placement = residency.placement
        self._residency, self._ledger, self._lookahead = residency, ledger, lookahead
        self._present = Present(placement)
        most = USED // 8 + max(placement.top_k)
        self._journal = np.zeros((len(usage), most), np.int64)
        self._journal[:, USED // 8 :] = _NOBODY
        self._at = [self._addresses(layer).ctypes.data for layer in range(len(usage))]
        self._calls: list[TokenExperts | None] = []
        self._filled = False
        scratch: dict[tuple[HostExperts, int], Scratch] = {}
        for layer, counts in enumerate(usage):
            kernels, top_k = compiled.kernels(layer), placement.top_k[layer]
            if kernels is None:
                self._calls.append(None)
                continue
            if (kernels, top_k) not in scratch:
                scratch[kernels, top_k] = Scratch(kernels, top_k)
            self._calls.append(
                TokenExperts(
                    kernels, scratch[kernels, top_k], self._addresses(layer),
                    int(placement.first[layer]), counts.data_ptr(), self._journal[layer],
                )
            )  # fmt: skip

    def _addresses(self, layer: int) -> NDArray[np.int64]:
        first = self._residency.placement.first
        return self._present.addresses[first[layer] : first[layer + 1]]

    def compute(
        self, layer: int, hidden: torch.Tensor, top_k: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """The layer's output [1, H] for one token; None, and nothing is done, where the usual way
        must be gone: some are not there, or what was read ahead for this layer must be seen to.
        """
        call = self.ready(layer)
        if call is None or not call.takes(hidden, top_k, weights):
            return None
        y = torch.empty_like(hidden)
        if not call.begin(hidden.data_ptr(), top_k.data_ptr()):
            return None
        self.noted()
        try:
            self.beside(layer, None, top_k)
        finally:
            call.finish(weights.data_ptr(), y.data_ptr())
        return y

    def leased(
        self,
        layer: int,
        hidden: torch.Tensor,
        top_k: torch.Tensor,
        weights: torch.Tensor,
        meanwhile: Callable[[], Lease],
    ) -> tuple[torch.Tensor, float, float] | None:
        """The layer's output [1, H] for one token, some of whose experts must be read; seconds that
        this thread computed those that were there, and all. None where there are no kernels.

        `meanwhile` leases them: it is called while the other threads compute those that are there,
        and may move no other.
        """
        call = self._calls[layer]
        if call is None or not call.takes(hidden, top_k, weights):
            return None
        y, given = torch.empty_like(hidden), (hidden.data_ptr(), top_k.data_ptr())
        call.start()
        began = time.perf_counter()
        begun, left = call.begin_some(*given), False
        paused = time.perf_counter()
        try:
            lease = meanwhile()
        finally:
            resumed = time.perf_counter()
            if begun:
                left = call.finish_some()
            ended = time.perf_counter()
        with lease:
            hits = compute_seconds(ended - began, resumed - paused, left, call.threads)
            hits += _seconds(self._some, call, given)  # what came in just now
            computed = hits + sum(_seconds(self._some, call, given) for _ in lease.arrivals())
            call.sum(weights.data_ptr(), y.data_ptr())
        return y, hits, computed

    @staticmethod
    def _some(call: TokenExperts, given: tuple[int, int]) -> None:
        if call.begin_some(*given):
            call.finish_some()

    def noted(self) -> None:
        """A layer has written into the journal."""
        self._filled = True

    def needed_next(self, layer: int) -> int:
        """The address of the next layer's addresses; 0 where nothing can be read ahead for it."""
        last = layer + 1 == len(self._calls)
        if last or self._lookahead is None or self._present.whole(layer + 1):
            return 0
        return self._at[layer + 1]

    def ready(self, layer: int) -> TokenExperts | None:
        """What computes `layer`, if it may."""
        return None if self._residency.expects(layer) else self._calls[layer]

    def beside(self, layer: int, hidden: torch.Tensor | None, top_k: torch.Tensor) -> None:
        """While experts `top_k` of `layer` are computed: ask for what the next layer lacks of what
        it will probably want. `hidden` is what its router was given, where its module was not."""
        if self._lookahead is None:
            return
        self._lookahead.observe(layer, top_k)
        if not self.needed_next(layer):
            return
        if hidden is not None:
            self._lookahead.saw(layer, hidden)
        experts = self._lookahead.predict(layer + 1)
        if experts and not self._addresses(layer + 1)[experts].all():
            self._residency.look_ahead(layer + 1, experts, beside=(layer, top_k[0].tolist()))

    def keep_books(self, last_end: float) -> float:
        """Note what tokens used since the last time; when the last experts layer ended, where
        `last_end` is when the one before these did. Times are those of `time.perf_counter`."""
        if not self._filled:
            return last_end
        self._filled = False
        journal, step = self._journal, self._residency.placement.step
        layers = np.flatnonzero(journal[:, BEGAN // 8])
        used = journal[layers, USED // 8 :]
        self._residency.served(used[used != _NOBODY])
        for layer in layers.tolist():
            began, ended = (float(journal[layer, at // 8]) * _NANO for at in (BEGAN, ENDED))
            self._ledger.timings.append(
                LayerTiming(step, layer, 1, began - last_end, ended - began, 0.0, 0.0, 0)
            )
            last_end = ended
        journal[:, BEGAN // 8] = 0
        return last_end


def compute_seconds(elapsed: float, elsewhere: float, left: bool, threads: int) -> float:
    """What would have taken `threads` threads so long as they computed, all the time.

    One of them was `elsewhere`; the others computed all the time if something was `left` when it
    came back, else at least as long as it did.
    """
    own = elapsed - elsewhere
    return (own + (threads - 1) * (elapsed if left else own)) / threads


def _seconds(function: Callable[..., None], *given: Any) -> float:
    """That a call took."""
    started = time.perf_counter()
    function(*given)
    return time.perf_counter() - started
