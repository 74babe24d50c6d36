"""Sampling filters against naive definitions; seeds reproduce."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tierrun.engine.sampling import (
    Sampler,
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    sampling_from,
)
from tierrun.io.errors import UsageError

NO_HISTORY: list[int] = []

distinct_logits = st.lists(
    st.integers(-64, 64), min_size=1, max_size=20, unique=True
).map(lambda numbers: [n / 8 for n in numbers])  # fmt: skip


def kept(logits: torch.Tensor) -> set[int]:
    return set(logits.isfinite().nonzero().flatten().tolist())


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [power / sum(powers) for power in powers]


@given(distinct_logits, st.integers(0, 25))
def test_top_k_keeps_the_k_largest(logits: list[float], k: int) -> None:
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    wanted = set(order[:k]) if k else set(order)
    assert kept(keep_top_k(torch.tensor(logits), k)) == wanted


def test_top_k_keeps_ties_together() -> None:
    assert kept(keep_top_k(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1)) == {1, 2}


@given(distinct_logits, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_reach_p(logits: list[float], p: float) -> None:
    probabilities = softmax(logits)
    wanted, total = set[int](), 0.0
    for i in sorted(range(len(logits)), key=lambda i: -logits[i]):
        assume(abs(total - p) > 1e-5)  # so close, rounding decides
        if total >= p and p < 1:
            break
        wanted.add(i)
        total += probabilities[i]
    assert kept(keep_top_p(torch.tensor(logits), p)) == wanted


@given(distinct_logits, st.floats(0, 0.99))
def test_min_p_keeps_what_is_near_the_most_probable(logits: list[float], p: float) -> None:
    probabilities = softmax(logits)
    assume(all(abs(q - p * max(probabilities)) > 1e-6 for q in probabilities))
    wanted = {i for i, q in enumerate(probabilities) if q >= p * max(probabilities)}
    assert kept(keep_min_p(torch.tensor(logits), p)) == wanted


@given(distinct_logits, st.lists(st.integers(0, 19), max_size=8), st.floats(0.5, 2))
def test_a_penalty_weakens_what_was_said_once(
    logits: list[float], said: list[int], penalty: float
) -> None:
    """However often it was said; negative logits are multiplied, positive divided."""
    history = [token % len(logits) for token in said]
    got = penalise(torch.tensor(logits), history, penalty)
    wanted = [
        (x / penalty if x > 0 else x * penalty) if i in history else x for i, x in enumerate(logits)
    ]
    torch.testing.assert_close(got, torch.tensor(wanted))


@given(distinct_logits, st.floats(0.01, 1), st.integers(0, 5), st.floats(0, 0.9))
def test_the_most_probable_token_is_never_filtered(
    logits: list[float], p: float, k: int, min_p: float
) -> None:
    best = max(range(len(logits)), key=lambda i: logits[i])
    filtered = keep_min_p(keep_top_p(keep_top_k(torch.tensor(logits), k), p), min_p)
    assert best in kept(filtered)


@given(distinct_logits)
def test_temperature_zero_is_greedy(logits: list[float]) -> None:
    chosen = Sampler(Sampling()).choose(torch.tensor(logits), NO_HISTORY)
    assert logits[chosen] == max(logits)


def test_greedy_respects_the_penalty() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    assert sampler.choose(torch.tensor([1.0, 1.5]), [1]) == 0


def draws(sampling: Sampling, count: int = 200) -> list[int]:
    sampler, logits = Sampler(sampling), torch.tensor([0.0, 1.0, 2.0, 3.0])
    return [sampler.choose(logits, NO_HISTORY) for _ in range(count)]


def test_a_seed_reproduces_and_another_differs() -> None:
    assert draws(Sampling(1.0, seed=7)) == draws(Sampling(1.0, seed=7))
    assert draws(Sampling(1.0, seed=7)) != draws(Sampling(1.0, seed=8))


def test_without_a_seed_every_sampler_differs() -> None:
    assert draws(Sampling(1.0)) != draws(Sampling(1.0))


def test_draws_follow_the_probabilities() -> None:
    counts = Counter(draws(Sampling(1.0, seed=0), count=4000))
    for token, probability in enumerate(softmax([0.0, 1.0, 2.0, 3.0])):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    shares = [draws(Sampling(t, seed=0)).count(3) for t in (0.2, 1.0, 5.0)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 190 > shares[2]


def test_filtered_tokens_are_never_drawn() -> None:
    assert set(draws(Sampling(5.0, top_k=2, seed=0))) == {2, 3}
    assert set(draws(Sampling(1.0, min_p=0.3, seed=0))) == {2, 3}
    assert set(draws(Sampling(1.0, top_p=0.6, seed=0))) == {3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("temperature", float("nan")),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match="out of range"):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_a_models_defaults_are_overridden_by_what_is_given() -> None:
    defaults = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert sampling_from(defaults) == Sampling(0.6, 20, 0.95)
    assert sampling_from(defaults, temperature=0.0, top_p=None) == Sampling(0.0, 20, 0.95)
    assert sampling_from({"do_sample": True}) == Sampling(1.0)


@pytest.mark.parametrize("defaults", [{}, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}])
def test_a_model_that_does_not_ask_for_sampling_is_greedy(defaults: dict[str, object]) -> None:
    assert sampling_from(defaults) == Sampling()
