"""Percentiles and the rank test: their definitions, and what no data may break."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.bench.report import percentile, spread
from tierrun.bench.significance import _EXACT, _normal, least_p, mann_whitney

numbers = st.floats(-1e9, 1e9)
few = st.lists(numbers, min_size=1, max_size=12)


@given(values=st.lists(numbers, min_size=1, max_size=200), percent=st.floats(0.1, 100))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(
    values: list[float], percent: float
) -> None:
    found = percentile(sorted(values), percent)
    need = math.ceil(percent / 100 * len(values))
    assert sum(value <= found for value in values) >= need
    assert sum(value < found for value in values) < max(1, need)
    assert percentile(sorted(values), 100) == max(values)


@given(values=st.lists(numbers, min_size=1))
def test_the_median_lies_within_its_spread(values: list[float]) -> None:
    found = spread(values)
    assert found.least <= found.median <= found.largest
    assert found == spread(values[::-1])


@given(first=few, second=few)
def test_p_is_a_probability_whichever_comes_first(first: list[float], second: list[float]) -> None:
    p = mann_whitney(first, second)
    assert 0 < p <= 1
    assert p == pytest.approx(mann_whitney(second, first))


@given(first=few, second=few)
def test_only_the_order_counts(first: list[float], second: list[float]) -> None:
    def squeezed(values: list[float]) -> list[int]:
        order = sorted({*first, *second})
        return [order.index(value) ** 3 for value in values]

    assert mann_whitney(first, second) == pytest.approx(
        mann_whitney(squeezed(first), squeezed(second))
    )


@given(values=few)
def test_a_set_does_not_differ_from_itself(values: list[float]) -> None:
    assert mann_whitney(values, values) == pytest.approx(1.0)
    assert mann_whitney(values * 5, values * 5) == pytest.approx(1.0)


@given(first=st.sets(st.integers(0, 99), min_size=1, max_size=8), count=st.integers(1, 8))
def test_the_clearest_separation_has_the_least_p(first: set[int], count: int) -> None:
    low, high = sorted(first), [100 + i for i in range(count)]
    assert mann_whitney(low, high) == pytest.approx(least_p(len(low), count))


def test_known_values() -> None:
    """U = 0 of five and five: 2 of 252 orders; and one outlier is one outlier."""
    assert mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert mann_whitney([1, 2, 3, 4, 5], [1.5, 2.5, 3.5, 4.5, 1e9]) > 0.4
    assert least_p(3, 3) == pytest.approx(0.1)
    assert least_p(4, 4) < 0.05


@given(first=st.lists(st.integers(0, 6), min_size=1, max_size=5), count=st.integers(1, 5))
def test_every_order_is_counted(first: list[int], count: int) -> None:
    """Against going through all choices by hand, ties included."""
    second = [i % 4 for i in range(count)]
    pool = sorted([*first, *second])
    ranks = {x: sum(i + 1 for i, y in enumerate(pool) if y == x) / pool.count(x) for x in pool}
    mean = len(first) * (len(pool) + 1) / 2
    distance = abs(sum(ranks[x] for x in first) - mean)
    sums = [sum(ranks[x] for x in some) for some in combinations(pool, len(first))]
    far = sum(abs(total - mean) >= distance - 1e-9 for total in sums)
    assert mann_whitney(first, second) == pytest.approx(far / len(sums))


@given(shift=st.integers(0, 25))
def test_many_values_are_judged_by_the_normal_distribution(shift: int) -> None:
    first = [i * 1.0 for i in range(20)]
    second = [i + shift + 0.5 for i in range(_EXACT - 20)]
    exact, ranks = mann_whitney(first, second), sorted([*first, *second])
    doubled = [2 * (ranks.index(value) + 1) for value in [*first, *second]]
    distance = abs(sum(doubled[:20]) - 20 * 41)
    assert _normal(doubled, 20, distance) == pytest.approx(exact, abs=0.01)
