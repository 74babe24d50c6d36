"""Replacement policies against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.io.errors import UsageError
from tierrun.tiers.policy import POLICIES, Lfru, Lru, Policy, Rates, make_policy

NUM_EXPERTS = 6
HALF_LIFE = 8.0

histories = st.lists(
    st.tuples(st.integers(0, 20), st.sets(st.integers(0, NUM_EXPERTS - 1), max_size=3)),
    max_size=30,
)
"""Pauses between uses, and the experts used."""


def replay(policy: Policy, history: list[tuple[int, set[int]]]) -> tuple[int, list[list[int]]]:
    """The last step, and the steps at which each expert was used."""
    step, uses = 0, [[] for _ in range(NUM_EXPERTS)]
    for pause, experts in history:
        step += pause
        policy.used(np.array(sorted(experts), dtype=np.int64), step)
        for expert in experts:
            if step not in uses[expert]:
                uses[expert].append(step)
    return step, uses


def worth_of_all(policy: Policy, step: int) -> list[float]:
    worth: list[float] = policy.worth(np.arange(NUM_EXPERTS), step).tolist()
    return worth


@given(histories, st.integers(0, 50))
def test_lru_ranks_by_the_last_use(history: list[tuple[int, set[int]]], later: int) -> None:
    policy = Lru(NUM_EXPERTS)
    step, uses = replay(policy, history)
    ranked = worth_of_all(policy, step + later)
    last = [max(steps, default=-1) for steps in uses]
    for a in range(NUM_EXPERTS):
        for b in range(NUM_EXPERTS):
            assert (ranked[a] < ranked[b]) == (last[a] < last[b])


@pytest.mark.parametrize("policy", [Lru(NUM_EXPERTS), Lfru(NUM_EXPERTS), Rates(NUM_EXPERTS)])
@given(histories, st.integers(0, 50))
def test_rates_are_shares_of_steps(
    policy: Policy, history: list[tuple[int, set[int]]], later: int
) -> None:
    fresh = type(policy)(NUM_EXPERTS)
    step, uses = replay(fresh, history)
    rates = fresh.rate(np.arange(NUM_EXPERTS), step + later).tolist()
    assert all(0 <= rate <= 1 for rate in rates)
    assert [rate > 0 for rate in rates] == [bool(steps) for steps in uses]


def test_lfru_finds_how_often_an_expert_is_used() -> None:
    policy = Lfru(NUM_EXPERTS)
    for step in range(3000):
        policy.used(np.array([0, *([1] if step % 4 == 0 else [])]), step)
    assert policy.rate(np.arange(3), 2999).tolist() == pytest.approx([1.0, 0.25, 0.0], abs=0.01)


@given(histories.map(lambda h: [(pause + 1, experts) for pause, experts in h]), st.integers(0, 50))
def test_lfru_is_decayed_uses_over_age(history: list[tuple[int, set[int]]], later: int) -> None:
    policy = Lfru(NUM_EXPERTS, HALF_LIFE)
    step, uses = replay(policy, history)
    now = step + later
    naive = [
        sum(2 ** (-(now - s) / HALF_LIFE) for s in steps) / (now - max(steps) + 1) if steps else 0
        for steps in uses
    ]
    assert worth_of_all(policy, now) == pytest.approx(naive)


def test_lfru_keeps_what_is_used_often_over_what_was_used_last() -> None:
    """The order that a single pass through many experts must not upset."""
    policy = Lfru(NUM_EXPERTS)
    for step in range(20):
        policy.used(np.array([0]), step)
    policy.used(np.array([1]), 20)
    often, once, never = policy.worth(np.array([0, 1, 2]), 21)
    assert often > once > never == 0


def test_lfru_lets_go_of_yesterdays_favourite() -> None:
    policy = Lfru(NUM_EXPERTS, HALF_LIFE)
    for step in range(50):
        policy.used(np.array([0]), step)
    policy.used(np.array([1]), 150)
    yesterday, today = policy.worth(np.array([0, 1]), 151)
    assert today > yesterday


@given(st.lists(st.tuples(st.integers(1, 700), st.integers(0, NUM_EXPERTS - 1)), max_size=30))
def test_rates_are_the_mean_of_decayed_shares_of_steps(history: list[tuple[int, int]]) -> None:
    policy = Rates(NUM_EXPERTS)
    step, uses = replay(policy, [(pause, {expert}) for pause, expert in history])
    wanted = np.zeros(NUM_EXPERTS)
    for half_life in (2, 16, 1024):
        most = sum(2 ** (-n / half_life) for n in range(step + 1))
        for expert, steps in enumerate(uses):
            wanted[expert] += sum(2 ** ((s - step) / half_life) for s in steps) / most / 3
    assert worth_of_all(policy, step) == pytest.approx(wanted.tolist(), rel=1e-9, abs=1e-30)


def test_rates_keep_what_is_used_often_and_what_was_used_last() -> None:
    policy = Rates(NUM_EXPERTS)
    for step in range(2000):
        policy.used(np.array([0] if step % 4 == 0 else [1] if step % 64 == 1 else [2]), step)
    policy.used(np.array([3]), 2000)  # for the first time
    often, seldom, mostly, lately = policy.worth(np.arange(4), 2000)
    assert mostly > often > seldom and lately > seldom
    assert policy.worth(np.array([3]), 2064) < seldom, "once is soon forgotten"


@pytest.mark.parametrize("name", POLICIES)
@given(history=histories)
def test_asking_changes_nothing(name: str, history: list[tuple[int, set[int]]]) -> None:
    asked, left_alone = make_policy(name, NUM_EXPERTS), make_policy(name, NUM_EXPERTS)
    step = 0
    for pause, experts in history:
        step += pause
        for policy in (asked, left_alone):
            policy.used(np.array(sorted(experts), dtype=np.int64), step)
        worth_of_all(asked, step + 1000)
    assert worth_of_all(asked, step) == worth_of_all(left_alone, step)


@pytest.mark.parametrize("name", POLICIES)
@given(history=histories, later=st.integers(0, 50))
def test_worth_does_not_depend_on_what_else_is_asked(
    name: str, history: list[tuple[int, set[int]]], later: int
) -> None:
    policy = make_policy(name, NUM_EXPERTS)
    step = replay(policy, history)[0] + later
    alone = [policy.worth(np.array([expert]), step)[0] for expert in range(NUM_EXPERTS)]
    assert alone == worth_of_all(policy, step)


def test_an_unknown_policy_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match="--policy belady: choose rates, lfru, lru, layers"):
        make_policy("belady", NUM_EXPERTS)
