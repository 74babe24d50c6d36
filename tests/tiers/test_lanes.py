"""Who computes what lies in RAM: the slower of two lanes ends as early as it can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.tiers.lanes import LANES, Cost, Lanes

MIB = 1 << 20
sizes = st.lists(st.integers(1, 40 * MIB), max_size=12)
starts, slopes = st.floats(0, 1e-3), st.floats(1e-12, 1e-8)


def ends(lanes: Lanes, nbytes: list[int], work: list[int], count: int) -> float:
    copied, computed = sum(nbytes[:count]), sum(work[count:])
    return max(lanes.copy.seconds(copied), lanes.cpu.seconds(computed))


@given(sizes, st.data(), starts, slopes, starts, slopes)
def test_no_other_split_ends_earlier(
    nbytes: list[int], data: st.DataObject, s: float, b: float, other_s: float, other_b: float
) -> None:
    work = [n * data.draw(st.integers(1, 8)) for n in nbytes]
    lanes = Lanes(Cost(s, b), Cost(other_s, other_b))
    count = lanes.num_copied(nbytes, work)
    best = ends(lanes, nbytes, work, count)
    assert all(best <= ends(lanes, nbytes, work, n) for n in range(len(nbytes) + 1))


def test_equal_lanes_share_equally_and_a_fast_one_takes_more() -> None:
    equal, fast = Cost(0, 1e-10), Cost(0, 2e-11)
    assert Lanes(equal, Cost(0, 1e-10)).num_copied([MIB] * 8, [MIB] * 8) == 4
    assert Lanes(fast, equal).num_copied([MIB] * 8, [MIB] * 8) == 7
    assert Lanes(equal, fast).num_copied([MIB] * 8, [MIB] * 8) == 1


def test_several_tokens_of_one_expert_cost_the_cpu_more() -> None:
    lanes = Lanes(Cost(0, 1e-10), Cost(0, 1e-10))
    assert lanes.num_copied([MIB] * 8, [8 * MIB] * 8) > 4


def test_a_lane_may_be_the_only_one() -> None:
    costs = Cost(0, 1e-10), Cost(0, 1e-10)
    counts = {mode: Lanes(*costs, mode).num_copied([MIB] * 6, [MIB] * 6) for mode in LANES}
    assert counts == {"auto": 3, "copy": 6, "cpu": 0}


@given(starts, slopes, st.lists(st.integers(1, 64), min_size=2, max_size=8, unique=True))
def test_a_cost_learns_what_it_sees(start: float, slope: float, counts: list[int]) -> None:
    cost = Cost(1e-4, 1e-10)
    for _ in range(60):
        for count in counts:
            cost.observe(count * MIB, start + count * MIB * slope)
    for count in counts:
        truth = start + count * MIB * slope
        assert cost.seconds(count * MIB) == pytest.approx(truth, rel=0.05, abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 1 << 30), st.floats(0, 1)), max_size=30))
def test_a_cost_never_falls_below_zero(seen: list[tuple[int, float]]) -> None:
    cost = Cost(1e-5, 1e-10)
    for nbytes, seconds in seen:
        cost.observe(nbytes, seconds)
    assert cost.slope >= 0 and cost.start >= 0
    assert cost.seconds(0) == 0 and cost.seconds(MIB) >= 0
    assert cost.text()


def test_it_forgets() -> None:
    cost = Cost(0, 1e-10)
    for _ in range(300):
        cost.observe(MIB, 1e-4)
        cost.observe(4 * MIB, 4e-4)
    for _ in range(300):
        cost.observe(MIB, 3e-4)
        cost.observe(4 * MIB, 12e-4)
    assert cost.seconds(2 * MIB) == pytest.approx(6e-4, rel=0.05)
