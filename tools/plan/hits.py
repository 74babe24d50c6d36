"""Which tier serves how many of the lookups."""

from typing import NamedTuple

import numpy as np

from tierrun.tools.plan.routing import Routing

_ROUNDS = 20


class Hits(NamedTuple):
    """Shares of the lookups by the tier that serves them; they sum to one."""

    hot: float
    warm: float
    cold: float


class Tiers(NamedTuple):
    """Bytes of experts that the hot and the warm tier keep."""

    hot: int
    warm: int


def hits(tiers: Tiers, expert_bytes: int, routing: Routing, layer_bytes: float = 0.0) -> Hits:
    """The hot tier has the best, the warm tier the next best. `layer_bytes` are what a token uses
    of a layer: as much of it as is missing passes through slots, which keep nothing meanwhile."""
    hot, cold = min(1.0, tiers.hot / expert_bytes), 0.0
    for _ in range(_ROUNDS):  # what is missing takes room, and what lacks room is missing
        kept = tiers.hot + tiers.warm - cold * layer_bytes
        both = max(0.0, min(1.0, kept / expert_bytes))
        cold = 1.0 - routing.served(both)
    first = routing.served(min(hot, both))
    return Hits(first, 1.0 - cold - first, cold)


def distinct(routing: Routing, lookups: float, tokens: int, kept: float = 0.0) -> float:
    """The share of all experts that `tokens` tokens of `lookups` each choose, without the `kept`
    best. Choices of different tokens are taken to be independent."""
    shares = np.array(routing.popularity)
    outside = np.clip(np.arange(1, len(shares) + 1) - kept * len(shares), 0.0, 1.0)
    chosen = 1.0 - (1.0 - np.minimum(1.0, shares * lookups)) ** tokens
    return float((outside * chosen).sum()) / len(shares)
