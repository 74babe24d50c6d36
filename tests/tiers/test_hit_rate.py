"""The cache works: it hits, and hits more with more room."""

import numpy as np
import pytest
from tests.fakes import Experts
from tests.tiers.rig import Rig, make_rig

pytestmark = pytest.mark.timeout(60)


WIDE = [Experts(12, 2), Experts(12, 2), Experts(12, 2)]


def skewed_stream(tokens: int) -> list[tuple[int, list[int]]]:
    """Layers and pairs of experts, a few of them wanted most of the time."""
    generator = np.random.default_rng(7)
    share = 1 / np.arange(1, 13) ** 1.2
    return [
        (layer, generator.choice(12, 2, replace=False, p=share / share.sum()).tolist())
        for _ in range(tokens)
        for layer in range(3)
    ]


def hit_rate(rig: Rig) -> float:
    for layer, experts in skewed_stream(60):
        if layer == 0:
            rig.residency.next_step()
        rig.decode(layer, experts)
    return (rig.counters.hot + rig.counters.warm) / rig.counters.lookups


@pytest.mark.parametrize("policy", ["lru", "lfru", "rates"])
@pytest.mark.parametrize("tiers", ["warm", "hot", "both"])
def test_the_cache_is_never_inert_and_grows_with_its_budget(policy: str, tiers: str) -> None:
    rates = []
    for slots in (3, 8, 16, 36):
        hot = {"warm": 0, "hot": slots, "both": slots // 2}[tiers]
        warm = {"warm": slots, "hot": 0, "both": max(3, slots - slots // 2)}[tiers]
        with make_rig(hot=(hot,), warm=(warm,), layers=WIDE, policy=policy) as rig:
            rates.append(hit_rate(rig))
    assert rates[0] > 0
    assert rates == sorted(set(rates)), "more slots, more hits"
    assert rates[-1] > 0.85, "with room for all, an expert is read once"


def test_frequency_beats_recency_where_a_few_are_wanted_often() -> None:
    rates = {}
    for policy in ("lru", "lfru", "rates"):
        with make_rig(warm=(9,), layers=WIDE, policy=policy) as rig:
            rates[policy] = hit_rate(rig)
    assert min(rates["lfru"], rates["rates"]) > rates["lru"]
