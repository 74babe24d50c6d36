"""Which experts tokens choose: default curves, or what a store has recorded."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tierrun.io.errors import UsageError
from tierrun.tiers.usage import Usage

DEFAULTS = ("seed", "local", "uniform")
NAMES = (*DEFAULTS, "recorded")

_TOP, _SHARE = 0.20, 0.85
"""The seed: the top 20 % of experts take 85 % of the lookups, where top-k lets them."""

_LOCAL = ((0.0, 0.0), (0.125, 0.67), (0.25, 0.81), (1.0, 1.0))
"""Share of the experts that LRU keeps → its hits, of a trace without static skew (512 experts,
LRU-64 and LRU-128: llama.cpp#27861)."""

_TOKENS = 1500


@dataclass(frozen=True, slots=True)
class Routing:
    """`popularity`: share of the lookups by expert, descending, sums to one. `curve`: share of the
    experts that a tier keeps → share of the lookups that it serves, ascending from (0, 0) to
    (1, 1)."""

    name: str
    popularity: tuple[float, ...]
    curve: tuple[tuple[float, float], ...]
    source: str

    def served(self, kept: float) -> float:
        """The share of the lookups that the best `kept` (0 … 1) of the experts serve."""
        places, shares = zip(*self.curve, strict=True)
        return float(np.interp(kept, places, shares))


def seed(experts: int, top_k: int) -> Routing:
    """As skewed as the model that this project began with; kept are the most popular."""
    shares = _seed_popularity(experts, top_k)
    return Routing("seed", shares, _cumulative(shares), "default curve: the seed's skew")


def local(experts: int) -> Routing:
    """All equally popular in the long run, but the same again and again in the short."""
    return Routing("local", _flat(experts), _LOCAL, "default curve: flat, correlated in time")


def uniform(experts: int) -> Routing:
    """No skew and no memory: nothing can be learnt."""
    source = "default curve: every expert as likely as any other"
    return Routing("uniform", _flat(experts), ((0.0, 0.0), (1.0, 1.0)), source)


def recorded(usage: Usage) -> Routing:
    """As counted in a store's runs; kept are the most used of all layers.

    Raises:
        UsageError: nothing was counted.
    """
    counts = np.concatenate(usage).astype(np.float64)
    total = counts.sum()
    if not total:
        raise UsageError("--routing recorded: the store has no recorded usage; run it once")
    shares = tuple((np.sort(counts)[::-1] / total).tolist())
    tokens = max(int(row.sum()) for row in usage)
    return Routing("recorded", shares, _cumulative(shares), f"{tokens} choices a layer, recorded")


def choose(name: str | None, usage: Usage | None, experts: int, top_k: int) -> Routing:
    """The routing called `name`; None: what is recorded where there is enough, else the seed's.

    Raises:
        UsageError: no such name, or nothing recorded.
    """
    if name is not None and name not in NAMES:
        raise UsageError(f"--routing {name}: choose {', '.join(NAMES)}")
    enough = usage is not None and all(row.sum() >= 4 * len(row) for row in usage)
    if name == "recorded" or (name is None and enough):
        return recorded(usage or [np.zeros(1, dtype=np.int64)])
    if name in ("local", "uniform"):
        return local(experts) if name == "local" else uniform(experts)
    return seed(experts, top_k)


def _flat(experts: int) -> tuple[float, ...]:
    return (1 / experts,) * experts


def _cumulative(shares: Sequence[float]) -> tuple[tuple[float, float], ...]:
    served = np.minimum(1.0, np.concatenate([[0.0], np.cumsum(shares)]))
    served[-1] = 1.0
    return tuple(zip(np.linspace(0, 1, len(served)).tolist(), served.tolist(), strict=True))


@lru_cache
def _seed_popularity(experts: int, top_k: int) -> tuple[float, ...]:
    """Normal popularities of the width that gives the seed's share; found by halving."""
    wanted = _SHARE * min(1.0, _TOP * experts / top_k)
    low, high = 0.0, 6.0
    for _ in range(12):
        middle = (low + high) / 2
        shares = _choices(experts, top_k, middle)
        top = np.interp(_TOP, *np.array(_cumulative(shares.tolist())).T)
        low, high = (middle, high) if top < wanted else (low, middle)
    return tuple(_choices(experts, top_k, (low + high) / 2).tolist())


def _choices(experts: int, top_k: int, sigma: float) -> NDArray[np.float64]:
    """Share of the choices by expert where scores are a popularity of width `sigma` plus noise."""
    random = np.random.default_rng(0)
    popularity = sigma * np.sort(random.normal(size=experts))
    scores = popularity + random.normal(size=(_TOKENS, experts))
    chosen = np.argpartition(scores, experts - top_k, axis=1)[:, experts - top_k :]
    counts = np.bincount(chosen.ravel(), minlength=experts).astype(np.float64)
    shares: NDArray[np.float64] = np.sort(counts)[::-1] / counts.sum()
    return shares
