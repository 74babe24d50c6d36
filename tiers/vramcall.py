"""One fetch or stream of the VRAM tier, and what it holds until it is over."""

from collections import deque
from collections.abc import Callable, Iterable

from tierrun.tiers.copies import Barrier, Copies
from tierrun.tiers.tier import Tier


class VramCall:
    """The slots in VRAM that kernels may read because of one fetch or stream.

    Guarantees: a slot is given back only when copies enqueued later are behind the kernels that
    read it, or when the call is over.
    """

    def __init__(self, layer: int, record_class: int, tier: Tier, copies: Copies) -> None:
        self.layer, self.record_class = layer, record_class
        self._tier, self._copies = tier, copies
        self._slots: list[int] = []
        self._launched: deque[tuple[Barrier, list[int]]] = deque()
        self._release: Callable[[], None] | None = None

    def lease(self, slots: Iterable[int]) -> None:
        """Kernels that read `slots` are about to be launched."""
        for slot in slots:
            self._tier.leases[slot] += 1
            self._slots.append(slot)

    def launched(self) -> None:
        """The kernels that read what was leased since the last time are launched.

        Said early, the slots come back early: `recycle` says it too, of everything.
        """
        if self._slots:
            self._launched.append((self._copies.computed(), self._slots))
            self._slots = []

    def recycle(self) -> bool:
        """Give back the oldest slots, once copies are behind their kernels; False if none.

        All kernels that read what was leased are launched.
        """
        self.launched()
        if not self._launched:
            return False
        barrier, slots = self._launched.popleft()
        barrier()
        self._give_back(slots)
        return True

    def hold(self, release: Callable[[], None]) -> None:
        """Something is held until `let_go`, or until the call is over: `release` gives it back."""
        self._release = release

    def let_go(self) -> None:
        """Give back what is held."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def close(self) -> None:
        """Give everything back; to be called any number of times."""
        self.let_go()
        for _, slots in self._launched:
            self._give_back(slots)
        self._give_back(self._slots)
        self._launched.clear()
        self._slots = []

    def _give_back(self, slots: list[int]) -> None:
        for slot in slots:
            self._tier.leases[slot] -= 1
