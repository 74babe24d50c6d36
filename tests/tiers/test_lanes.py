"""Who computes what lies in RAM: the slower of two lanes ends as early as it can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.tiers.lanes import HOST_TURN, LANES, Cost, Lanes

MIB = 1 << 20
starts, slopes = st.floats(0, 1e-3), st.floats(1e-12, 1e-8)


def ends(lanes: Lanes, number: int, share: int, nbytes: int) -> float:
    cpu = lanes.cpu.seconds(share * nbytes) + HOST_TURN * (share > 0)
    return max(lanes.gpu.seconds((number - share) * nbytes), cpu)


@given(st.integers(0, 64), st.integers(1, 40 * MIB), starts, slopes, starts, slopes)
def test_no_other_split_ends_earlier(
    number: int, nbytes: int, s: float, b: float, other_s: float, other_b: float
) -> None:
    lanes = Lanes(Cost(s, b), Cost(other_s, other_b))
    best = ends(lanes, number, lanes.cpu_share(number, nbytes), nbytes)
    assert all(best <= ends(lanes, number, n, nbytes) * 1.000001 for n in range(number + 1))


def test_equal_lanes_share_equally_and_a_fast_one_takes_more() -> None:
    equal, fast = Cost(0, 1e-10), Cost(0, 2e-11)
    assert Lanes(equal, Cost(0, 1e-10)).cpu_share(8, MIB) == 4
    assert Lanes(fast, equal).cpu_share(8, MIB) == 1
    assert Lanes(equal, fast).cpu_share(8, MIB) == 7


def test_the_one_that_is_always_last_gets_less() -> None:
    lanes = Lanes(Cost(0, 1e-10), Cost(0, 1e-10))

    def passes(count: int, *last: bool) -> int:
        for _ in range(count):
            for gpu_was_last in last:
                lanes.balance(gpu_was_last=gpu_was_last)
            lanes.has_changed()
        return lanes.cpu_share(8, MIB)

    assert passes(100, True, True, False) > 4
    before = passes(1, True)
    assert passes(100, True, False) == before, "balanced"
    assert 0 < passes(2000, False) < 4, "within bounds"


def test_a_lane_may_be_the_only_one() -> None:
    costs = Cost(0, 1e-10), Cost(0, 1e-10)
    shares = {mode: Lanes(*costs, mode).cpu_share(6, MIB) for mode in LANES}
    assert shares == {"auto": 3, "gpu": 0, "cpu": 6}


def test_a_mode_that_changes_is_seen_at_once() -> None:
    lanes = Lanes(Cost(0, 1e-10), Cost(0, 1e-10), "gpu")
    assert lanes.has_changed() and not lanes.has_changed()
    lanes.mode = "auto"
    seen = [lanes.has_changed() for _ in range(40)]
    assert seen[0] and 2 <= sum(seen) <= 8, "and now and then later"


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


def test_one_outlier_changes_little() -> None:
    cost = Cost(0, 1e-10)
    for _ in range(300):
        cost.observe(MIB, 1e-4)
    cost.observe(MIB, 1.0)
    assert cost.seconds(MIB) == pytest.approx(1e-4, rel=0.05)


def test_it_forgets() -> None:
    cost = Cost(0, 1e-10)
    for _ in range(300):
        cost.observe(MIB, 1e-4)
        cost.observe(4 * MIB, 4e-4)
    for _ in range(2000):
        cost.observe(MIB, 3e-4)
        cost.observe(4 * MIB, 12e-4)
    assert cost.seconds(2 * MIB) == pytest.approx(6e-4, rel=0.05)
