"""Where each expert lies that is whole in the tier that reads land in: for lookups that need no
lease, as nothing moves between the lookup and the last use."""

import numpy as np

from tierrun.tiers.placement import Placement


class Present:
    """Watches a placement whose experts are in one tier (it does not promote).

    `addresses` over all experts: in host memory, 0 where it is not there. The array stays the same.
    """

    def __init__(self, placement: Placement) -> None:
        assert not placement.promotes and not placement.homes, "experts that were not seen coming"
        self.addresses = np.zeros(int(placement.first[-1]), np.int64)
        self._layer_of = np.repeat(np.arange(len(placement.class_of_layer)), placement.sizes)
        self._absent: list[int] = placement.sizes.tolist()
        placement.watcher = self

    def whole(self, layer: int) -> bool:
        """Whether all experts of `layer` are there."""
        return self._absent[layer] == 0

    def came(self, expert: int, address: int) -> None:
        """See `Watcher`."""
        if self.addresses[expert] == 0:
            self._absent[self._layer_of[expert]] -= 1
        self.addresses[expert] = address

    def went(self, expert: int) -> None:
        """See `Watcher`; of one that never was whole, too."""
        if self.addresses[expert] != 0:
            self._absent[self._layer_of[expert]] += 1
        self.addresses[expert] = 0
