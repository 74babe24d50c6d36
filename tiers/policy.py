"""Which expert to keep: replacement policies, pure functions of what was used when.

A policy sees numbers only: experts as indices 0 … num_experts − 1 over all layers, and the step
(one per token). It never touches slots or bytes, so the same objects replay recorded traces.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tierrun.io.errors import UsageError

Experts = NDArray[np.int64]
"""Indices of experts, over all layers."""


class Policy(Protocol):
    """Ranks experts by how much it is worth to keep them.

    Guarantees: `worth` changes nothing, and each expert's is the same number, to the last bit,
    whatever others are asked for with it.
    """

    name: str

    def used(self, experts: Experts, step: int) -> None:
        """The router chose `experts` at `step`; steps never go back."""

    def worth(self, experts: Experts, step: int) -> NDArray[np.float64]:
        """The worth of each of `experts` at `step`; the lowest is evicted first."""

    def rate(self, experts: Experts, step: int) -> NDArray[np.float64]:
        """How often each of `experts` may be expected to be used, per step; at most 1."""


class Lru:
    """Least recently used goes first."""

    name = "lru"

    def __init__(self, num_experts: int) -> None:
        self._last = np.full(num_experts, -1, dtype=np.int64)

    def used(self, experts: Experts, step: int) -> None:
        self._last[experts] = step

    def worth(self, experts: Experts, step: int) -> NDArray[np.float64]:
        return self._last[experts].astype(np.float64)

    def rate(self, experts: Experts, step: int) -> NDArray[np.float64]:
        last = self._last[experts]
        return np.where(last < 0, 0.0, 1.0 / (step - last + 1))


class Lfru:
    """Frequency over age: uses, halved every `half_life` steps, by steps since the last one.

    From tinyserve's and vLLM's LFRU; the decay is added so that yesterday's topic does not hold
    its slots for ever.
    """

    name = "lfru"

    def __init__(self, num_experts: int, half_life: float = 256.0) -> None:
        self._last = np.full(num_experts, -1, dtype=np.int64)
        self._count = np.zeros(num_experts, dtype=np.float64)
        self._half_life = half_life

    def used(self, experts: Experts, step: int) -> None:
        idle = step - self._last[experts]
        self._count[experts] = self._decayed(experts, idle) + 1.0
        self._last[experts] = step

    def worth(self, experts: Experts, step: int) -> NDArray[np.float64]:
        idle = step - self._last[experts]
        return self._decayed(experts, idle) / (idle + 1)

    def rate(self, experts: Experts, step: int) -> NDArray[np.float64]:
        # What a use at each of the steps so far would have brought the count to.
        kept = 0.5 ** (1.0 / self._half_life)
        most = (1.0 - kept ** (step + 1)) / (1.0 - kept)
        rates: NDArray[np.float64] = self._decayed(experts, step - self._last[experts]) / most
        return np.minimum(1.0, rates)

    def _decayed(self, experts: Experts, idle: Experts) -> NDArray[np.float64]:
        decayed: NDArray[np.float64] = self._count[experts] * np.exp2(idle / -self._half_life)
        return decayed


class Rates:
    """Uses per step: the mean of three estimates, over some 3, 23 and 1500 steps.

    What is used again soon and what is used often are kept by one number. On recorded routing it
    misses less than LFRU, or as much (`python -m tierrun.bench.policies`).
    """

    name = "rates"

    def __init__(
        self, num_experts: int, half_lives: tuple[float, ...] = (2.0, 16.0, 1024.0)
    ) -> None:
        self._half_lives = np.array(half_lives)
        self._sums = np.zeros((len(half_lives), num_experts))
        """Each use counts 2^(its step / half-life): so nothing that is not used has to decay."""
        self._origin = 0
        """The step that is counted as 0, moved on before numbers become too large."""

    def used(self, experts: Experts, step: int) -> None:
        if step - self._origin >= _REBASE:
            self._sums *= self._decay(step)[:, None]
            self._origin = step
        self._sums[:, experts] += 1.0 / self._decay(step)[:, None]

    def worth(self, experts: Experts, step: int) -> NDArray[np.float64]:
        kept = np.exp2(-1.0 / self._half_lives)
        # A use at each of the steps so far would bring a sum, decayed, to the inverse of these.
        shares = self._decay(step) * (1.0 - kept) / (1.0 - kept ** (step + 1)) / len(kept)
        worth = np.zeros(len(experts))
        for sums, share in zip(self._sums, shares, strict=True):  # a product of matrices would
            worth += sums[experts] * share  # round differently with the number of experts
        return worth

    def rate(self, experts: Experts, step: int) -> NDArray[np.float64]:
        return np.minimum(1.0, self.worth(experts, step))

    def _decay(self, step: int) -> NDArray[np.float64]:
        decay: NDArray[np.float64] = np.exp2((self._origin - step) / self._half_lives)
        return decay


_REBASE = 512
"""Steps: 2^256 is well within a float64."""


class Layers(Lru):
    """The first layers' experts stay, whatever is used: llama.cpp's split, to compare with."""

    name = "layers"

    def worth(self, experts: Experts, step: int) -> NDArray[np.float64]:
        return (len(self._last) - experts).astype(np.float64)


POLICIES = {policy.name: policy for policy in (Rates, Lfru, Lru, Layers)}


def make_policy(name: str, num_experts: int) -> Policy:
    """The policy called `name`.

    Raises:
        UsageError: no such policy.
    """
    if name not in POLICIES:
        raise UsageError(f"--policy {name}: choose {', '.join(POLICIES)}")
    return POLICIES[name](num_experts)
