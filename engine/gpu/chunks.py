"""Which chunks a prompt goes through a GPU in: as asked, fixed, or by bandwidths and memory.

`tierrun.tiers.chunking` has the arithmetic. Here its choice is tried out: a chunk that turns out
not to fit is halved, which costs at most as much time again as the first try.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from tierrun.engine.gpu.gauge import Gauge
from tierrun.engine.gpu.workspace import Estimate, Measured
from tierrun.engine.options import Options
from tierrun.tiers.budget import DeviceFigures, asked_vram, device_reserve
from tierrun.tiers.chunking import EFFICIENT, Chunk, Rates, Room, choose_chunk, sizes_for

log = logging.getLogger(__name__)

_INTERPRETED = 16
"""The chunk where kernels are interpreted."""

_LEAST = 16
"""No chunk is halved below this: up to eight tokens are computed as in decode."""


class Settled(NamedTuple):
    """The tokens of a chunk, and its cache and workspace."""

    tokens: int
    measured: Measured


class Trials(Protocol):
    """What tries chunks out; see `tierrun.engine.gpu.workspace.Workspaces`."""

    def measure(self, chunk: int) -> Measured: ...

    def estimate(self, sizes: tuple[int, ...]) -> Estimate: ...

    def release(self) -> None: ...


class Experts(NamedTuple):
    """Bytes: of all, of the smallest hot tier that works, and of RAM for them."""

    nbytes: int
    least: int
    ram: int


class _Wish(NamedTuple):
    """A chunk to try, in what room, and whether one of so many tokens and bytes will do."""

    chunk: Chunk
    room: Room
    will_do: Callable[[int, int], bool]


class ChunkChooser:
    """Settles the chunk of one engine with a context of `capacity` tokens.

    With `--exact` it is the same whatever the budgets are, as its size shows in the last bits.
    """

    def __init__(
        self,
        options: Options,
        capacity: int,
        experts: Experts,
        trials: Trials,
        gauge: Gauge,
        rates: Callable[[], Rates],
    ) -> None:
        self._options, self._capacity, self._experts = options, capacity, experts
        self._trials, self._gauge, self._rates = trials, gauge, rates

    def settle(self) -> Settled:
        """The chunk, its cache allocated; says which and why.

        Raises:
            torch.OutOfMemoryError: not even the smallest fits.
        """
        wish = self._wish()
        settled = self._largest(wish)
        asked, found = wish.chunk, settled.tokens
        if found == asked.tokens:
            log.info("prompts in chunks of %d: %s", found, asked.reason)
        elif self._options.ubatch:
            log.warning(
                "-ub %d does not fit into VRAM beside the experts: prompts in chunks of %d",
                self._options.ubatch,
                found,
            )
        else:
            log.info("prompts in chunks of %d: %d took too much VRAM", found, asked.tokens)
        return settled

    # -- what to try ----------------------------------------------------------------------------

    def _wish(self) -> _Wish:
        asked, context = self._options.ubatch, self._capacity
        if asked:
            return self._given(Chunk(min(asked, context), "as asked"))
        if self._gauge.interpreted:
            return self._given(Chunk(min(_INTERPRETED, context), "kernels are interpreted"))
        if self._options.exact:
            return self._given(Chunk(min(EFFICIENT, context), "--exact, whatever the budgets"))
        sizes = sizes_for(context)
        if len(sizes) == 1:
            return self._given(Chunk(sizes[0], f"a context of {context} is no more than one"))
        return self._chosen(sizes)

    def _given(self, chunk: Chunk) -> _Wish:
        """A chunk that is made smaller only where it must be."""
        room = self._room(self._gauge.figures())
        return _Wish(chunk, room, lambda _, taken: room.fits(taken))

    def _chosen(self, sizes: tuple[int, ...]) -> _Wish:
        estimate = self._trials.estimate(sizes)
        self._trials.release()
        room = self._room(estimate.figures)
        return _Wish(choose_chunk(estimate.taken, self._rates(), room), room, room.affords)

    def _room(self, figures: DeviceFigures) -> Room:
        return Room(
            free=self._free(figures),
            asked=asked_vram(self._options.vram, figures),
            least=self._experts.least,
            experts=self._experts.nbytes,
            ram=self._experts.ram,
        )

    def _free(self, figures: DeviceFigures) -> int:
        """What experts and chunks may have: as `resolve_device_vram` counts it."""
        reserve = device_reserve(figures.total) if self._options.vram == "auto" else 0
        return max(0, figures.free - reserve)

    # -- trying ---------------------------------------------------------------------------------

    def _largest(self, wish: _Wish) -> Settled:
        """The wish, or the largest of its halves that will do."""
        tokens = wish.chunk.tokens
        while True:
            measured = self._measured(tokens)
            if measured is not None and self._will_do(wish, tokens, measured):
                return Settled(tokens, measured)
            del measured  # its cache
            self._trials.release()
            tokens = max(_LEAST, tokens // 2)

    def _measured(self, tokens: int) -> Measured | None:
        """What a chunk needs; None if it is too much and there are smaller ones."""
        try:
            return self._trials.measure(tokens)
        except torch.OutOfMemoryError:
            if tokens <= _LEAST or self._options.exact:
                raise
            return None

    def _will_do(self, wish: _Wish, tokens: int, measured: Measured) -> bool:
        room = wish.room
        if tokens <= _LEAST or room.wanted > room.free:
            return True  # a smaller one would not help
        left = self._free(self._gauge.figures()) - measured.workspace.nbytes
        good = wish.will_do(tokens, room.free - left)
        if good or not self._options.exact:
            return good
        log.warning(
            "--exact: prompts stay in chunks of %d, which leaves too little VRAM for the experts; "
            "a smaller one (-ub) takes less",
            tokens,
        )
        return True
