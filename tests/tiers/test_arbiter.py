"""What memory is worth to whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.tiers.arbiter import Arbiter
from tierrun.tiers.ledger import Counters

MIB, GIB = 1 << 20, 1 << 30


def test_to_the_experts_memory_is_worth_the_copies_that_it_saves() -> None:
    counters = Counters(promoted_bytes=3 * GIB, demoted_bytes=GIB, copy_seconds=0.4)
    arbiter = Arbiter(counters)  # 0.1 s per GiB
    assert arbiter.worth_to_experts(512 * MIB, 5 * MIB) == pytest.approx(
        1000 * 5 * 0.1 / 1.024 / 512
    )
    assert "worth 0.954 ms per MiB and 1000 tokens" in arbiter.price(512 * MIB, 5 * MIB)


def test_before_much_is_copied_the_speed_is_a_guess() -> None:
    few = Counters(promoted_bytes=MIB, copy_seconds=100.0)
    assert Arbiter(few).worth_to_experts(MIB, 20e6) == Arbiter(Counters()).worth_to_experts(
        MIB, 20e6
    )
    assert Arbiter(Counters()).worth_to_experts(MIB, 20e6) == pytest.approx(1000)
    assert Arbiter(Counters()).worth_to_experts(0, 0.0) == 0


def test_to_the_context_it_is_worth_what_growing_has_cost_over_all_tokens() -> None:
    arbiter = Arbiter(Counters())
    assert arbiter.worth_to_context(MIB, 1000) == 0
    arbiter.grown(0.5)
    assert arbiter.worth_to_context(100 * MIB, 1000) == pytest.approx(5)
    assert arbiter.worth_to_context(100 * MIB, 10) == pytest.approx(5), "few tokens say little"
    assert arbiter.worth_to_context(100 * MIB, 10_000) == pytest.approx(0.5)
    arbiter.grown(0.5)
    assert arbiter.worth_to_context(100 * MIB, 1000) == pytest.approx(10), "twice as often"


def test_memory_goes_where_it_is_worth_more_and_both_worths_are_told() -> None:
    arbiter = Arbiter(Counters())
    assert not arbiter.judge(MIB, 0.0, 10).to_experts, "they have everything that they use"
    assert arbiter.judge(MIB, 20e6, 10).to_experts
    arbiter.grown(100.0)
    kept = arbiter.judge(MIB, 20e6, 10)
    assert not kept.to_experts
    assert (
        kept.reason == "worth 1e+03 ms per MiB and 1000 tokens to them, 1e+05 to the next context"
    )


@given(
    st.integers(1, 1 << 40),
    st.floats(0, 1e9),
    st.floats(0, 1e9),
    st.lists(st.floats(0, 1e4), max_size=4),
    st.integers(0, 10**6),
)
def test_more_traffic_never_speaks_against_the_experts(
    nbytes: int, traffic: float, more: float, growths: list[float], tokens: int
) -> None:
    arbiter = Arbiter(Counters())
    for growth in growths:
        arbiter.grown(growth)
    if arbiter.judge(nbytes, traffic, tokens).to_experts:
        assert arbiter.judge(nbytes, traffic + more, tokens).to_experts
        assert arbiter.judge(nbytes, traffic, tokens + 1000).to_experts
