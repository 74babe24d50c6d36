"""Whether two sets of rounds differ by more than their spread: Mann and Whitney's rank test.

It asks how often as clear a separation of the two sets would come about if both were drawn from one
distribution, whatever its form, and looks at the order of the values only: one outlier, however
far out, does not decide.
"""

import math
from collections import Counter
from collections.abc import Sequence

ALPHA = 0.05
"""Differences that chance would bring about less often than this are called differences."""

_EXACT = 40
"""Up to so many values in both sets all orders are counted; beyond it the normal distribution,
with its corrections for ties and for continuity, is as good."""


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p-value of two sets of at least one value each, 0 < p <= 1.

    Equal values share their ranks. Exact for up to 40 values.
    """
    ranks = _double_ranks([*first, *second])
    mean = len(first) * (len(ranks) + 1)  # of the sum of the first set's ranks, doubled
    distance = abs(sum(ranks[: len(first)]) - mean)
    if len(ranks) <= _EXACT:
        return _exact(ranks, len(first), mean, distance)
    return _normal(ranks, len(first), distance)


def least_p(num_first: int, num_second: int) -> float:
    """The smallest p-value that sets of so many values can have: all of one above the other."""
    return min(1.0, 2 / math.comb(num_first + num_second, num_first))


def _double_ranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each; equal ones have the mean of theirs, whose double is whole."""
    first_place: dict[float, int] = {}
    for place, value in enumerate(sorted(values)):
        first_place.setdefault(value, place)
    counts = Counter(values)
    return [2 * first_place[value] + counts[value] + 1 for value in values]


def _exact(ranks: Sequence[int], size: int, mean: int, distance: int) -> float:
    """The share of all choices of `size` ranks whose sum is at least `distance` from `mean`."""
    ways = [Counter[int]() for _ in range(size + 1)]
    ways[0][0] = 1
    for rank in ranks:
        for chosen in range(size, 0, -1):
            for total, count in ways[chosen - 1].items():
                ways[chosen][total + rank] += count
    far = sum(count for total, count in ways[size].items() if abs(total - mean) >= distance)
    return far / math.comb(len(ranks), size)


def _normal(ranks: Sequence[int], size: int, distance: int) -> float:
    count = len(ranks)
    ties = sum(n**3 - n for n in Counter(ranks).values())
    variance = size * (count - size) / 12 * (count + 1 - ties / (count * (count - 1)))
    if variance <= 0:  # all are equal
        return 1.0
    deviations = max(0.0, distance / 2 - 0.5) / math.sqrt(variance)
    return max(math.erfc(deviations / math.sqrt(2)), math.ulp(0.0))
