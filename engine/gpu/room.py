"""How much of the device's memory the context has, and how much the experts.

The key-value cache begins small and grows by powers of two, between two forward passes, with what
the experts give back; when the next context needs less, they take it again if it is worth more to
them. Every change moves the cache: passes that were recorded before are forgotten.
"""

import logging
import time
from collections.abc import Callable

import torch

from tierrun.engine.gpu.cache import FixedCache, GrowingCache
from tierrun.io.errors import BudgetError
from tierrun.io.extent import format_bytes
from tierrun.tiers.arbiter import Arbiter
from tierrun.tiers.vram import VramTier

log = logging.getLogger(__name__)

_GIVEN_AT_LEAST = 64 << 20
"""Bytes that the experts give when an allocation was refused although there seemed to be room."""


class ContextRoom:
    """Divides memory between one cache and the experts of one tier.

    `spare` says how many bytes of the device nobody needs; a position of the context takes
    `workspace` bytes besides its keys and values. `forget` drops every recorded pass.
    """

    def __init__(
        self,
        cache: FixedCache | GrowingCache,
        experts: VramTier,
        arbiter: Arbiter,
        spare: Callable[[], int],
        workspace: float,
        forget: Callable[[], None],
    ) -> None:
        self._cache, self._experts, self._arbiter = cache, experts, arbiter
        self._spare, self._workspace, self._forget = spare, workspace, forget
        self._least, self._lent = cache.room, 0
        self._was_relieved = False

    # -- more and less --------------------------------------------------------------------------

    def grow_to(self, length: int) -> None:
        """Have room for a context of `length` tokens; what is held stays.

        Raises:
            BudgetError: the experts cannot give so much; the context is as it was.
        """
        room = self._cache.room_for(length)
        if room <= self._cache.room:
            return
        self._check(room)
        started = time.perf_counter()
        self._forget()
        nbytes, given = self._needed(room), 0
        traffic = self._experts.chunks.traffic
        lacking = nbytes - self._spare()
        if lacking > 0:
            given = self._borrow(lacking)
        given += self._resize(room)
        self._arbiter.grown(time.perf_counter() - started)
        self._say_grown(room, nbytes, given, traffic - self._experts.chunks.traffic)

    def shrink_to(self, length: int) -> bool:
        """A context of `length` tokens begins: let the experts have what it does not need.

        True if they got something: the cache is empty then, whatever it held.
        """
        room = self._cache.room_for(length)
        if room >= self._cache.room:
            return False
        freed = -self._needed(room)
        traffic = self._experts.chunks.traffic_of_more(freed)
        tokens = self._experts.residency.placement.step
        to_experts, reason = self._arbiter.judge(freed, traffic, tokens)
        if not to_experts:
            log.debug("VRAM: the context keeps %s it does not need (%s)", _size(freed), reason)
            return False
        self._forget()
        self._cache.reset()
        self._resize(room)
        taken = self._experts.grow(max(self._due(), self._spare()))
        self._lent = max(0, self._lent - taken)
        log.info(
            "VRAM: context back to %d tokens: %s to the experts (%s)", room, _size(taken), reason
        )
        return True

    def relieve(self, nbytes: int, length: int) -> int:
        """The device ran out of memory with a context of `length` tokens, which begins anew.

        What was given back to it: room beyond that context, else at least `nbytes` of the experts'
        memory; 0 if there is nothing left to give. Said once.
        """
        self._cache.reset()
        room = self._cache.room_for(length)
        if room < self._cache.room:
            given = self._cache.nbytes
            self._forget()
            self._resize(room)
            return given - self._cache.nbytes
        given = self._experts.shrink(nbytes)
        if given and not self._was_relieved:
            self._was_relieved = True
            log.warning(
                "the GPU's memory ran out: the hot tier gave %s back and goes on with %s",
                *map(format_bytes, (given, self._experts.nbytes)),
            )
        return given

    def longest(self) -> int:
        """The longest context that can be had."""
        fitting, room = self._cache.room, 0
        while room != fitting:
            room, larger = fitting, self._cache.room_for(fitting + 1)
            if self._lacking(larger) <= self._experts.chunks.can_drop:
                fitting = larger
        return fitting

    # -- bytes ----------------------------------------------------------------------------------

    def _due(self) -> int:
        """Bytes that the experts have lent and that the context does not need any more."""
        return self._lent + self._needed(self._least)

    def _needed(self, room: int) -> int:
        """Bytes more than now that a context with this room takes."""
        workspace = int(self._workspace * (room - self._cache.room))
        return self._cache.nbytes_more(room) + workspace

    def _lacking(self, room: int) -> int:
        """Of these, what the experts would have to give."""
        return max(0, self._needed(room) - self._spare())

    def _check(self, room: int) -> None:
        if self._lacking(room) > self._experts.chunks.can_drop:
            raise self._refusal(room)

    def _refusal(self, room: int) -> BudgetError:
        more, can_give = self._needed(room), self._experts.chunks.can_drop + self._spare()
        return BudgetError(
            f"the context cannot grow to {room} tokens: that takes {format_bytes(more)} more of "
            f"VRAM, and beside the experts of a layer there are {format_bytes(can_give)}; "
            f"{self.longest()} tokens are the most that fit (-c)"
        )

    def _resize(self, room: int) -> int:
        """Move the cache; bytes that the experts had to give on the way."""
        given = 0
        while True:
            try:
                self._cache.resize(room)
            except torch.OutOfMemoryError:  # somebody else was quicker
                more = self._borrow(_GIVEN_AT_LEAST)
                if not more:
                    raise self._refusal(room) from None
                given += more
            else:
                self._release()
                return given

    def _borrow(self, nbytes: int) -> int:
        """What the experts give for the context, and are to have again."""
        given = self._experts.shrink(nbytes)
        self._lent += given
        return given

    def _release(self) -> None:
        """What the cache has left goes back to the device."""
        if self._experts.base.is_cuda:
            torch.cuda.empty_cache()

    def _say_grown(self, room: int, nbytes: int, given: int, traffic: float) -> None:
        price = f" ({self._arbiter.price(given, traffic)})" if given else ""
        log.info(
            "VRAM: context grew to %d tokens: %s more, %s of it from the experts%s",
            room,
            _size(nbytes),
            _size(given),
            price,
        )


def _size(nbytes: int) -> str:
    return format_bytes(max(0, nbytes))
