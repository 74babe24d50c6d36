"""The arithmetic: more of anything is never slower, and shares are shares."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.io.errors import UsageError
from tierrun.tools.plan import routing
from tierrun.tools.plan.decode import decode_times
from tierrun.tools.plan.hits import Tiers, distinct, hits
from tierrun.tools.plan.prefill import prefill_times
from tierrun.tools.plan.rates import KINDS, Rates, parse_assumed
from tierrun.tools.plan.shape import Experts, Shape

SHAPE = Shape(
    (Experts(64, 8, 2 << 20, 4_000_000),) * 12, 1 << 30, 1 << 29, 10**9, 1000, 0, True, False
)
LAYER_BYTES = 8 * (2 << 20)
CPU = Rates(3e9, 1e-4, 1e-3, memory=20e9, cpu=5e9, cpu_resident=10e9, cpu_flops=80e9)
GPU = Rates(3e9, 1e-4, 1e-4, pcie=25e9, in_place=16e9, vram=1e12, gpu_flops=100e12)
ROUTINGS = [routing.seed(64, 8), routing.local(64), routing.uniform(64)]

machines = st.sampled_from([CPU, GPU])
routings = st.sampled_from(ROUTINGS)
budgets = st.builds(Tiers, st.integers(0, 2 << 30), st.integers(0, 2 << 30))
FASTER = [field.name for field in fields(Rates)]


def seconds(tiers: Tiers, rates: Rates, route: routing.Routing) -> tuple[float, float]:
    found = hits(tiers, SHAPE.expert_bytes, route, LAYER_BYTES)
    prompt = prefill_times(SHAPE, tiers, route, rates, 512)
    return decode_times(SHAPE, found, rates, 1024).total, prompt.total


@given(budgets, routings)
def test_hit_rates_are_shares_of_one(tiers: Tiers, route: routing.Routing) -> None:
    found = hits(tiers, SHAPE.expert_bytes, route, LAYER_BYTES)
    assert sum(found) == pytest.approx(1)
    assert min(found) >= -1e-9


def test_what_passes_through_keeps_nothing() -> None:
    flat, experts = routing.uniform(64), 64 * 12 * (2 << 20)
    tiers = Tiers(0, experts // 2)
    assert hits(tiers, experts, flat).cold == pytest.approx(0.5)
    found = hits(tiers, experts, flat, LAYER_BYTES)
    assert found.cold == pytest.approx(0.5 + found.cold * LAYER_BYTES / experts)
    assert hits(Tiers(0, experts), experts, flat, LAYER_BYTES).cold == 0


@given(machines, routings, budgets, st.sampled_from(FASTER), st.floats(1, 100))
def test_a_faster_machine_is_never_slower(
    rates: Rates, route: routing.Routing, tiers: Tiers, name: str, factor: float
) -> None:
    takes_time = name in ("latency", "overhead")
    better = replace(rates, **{name: getattr(rates, name) * (1 / factor if takes_time else factor)})
    before, after = seconds(tiers, rates, route), seconds(tiers, better, route)
    assert all(new <= old * (1 + 1e-9) for old, new in zip(before, after, strict=True))


@given(machines, routings, budgets, st.integers(0, 1 << 30), st.booleans())
def test_more_memory_is_never_slower(
    rates: Rates, route: routing.Routing, tiers: Tiers, more: int, is_hot: bool
) -> None:
    larger = tiers._replace(**{"hot" if is_hot else "warm": tiers[not is_hot] + more})
    before, after = seconds(tiers, rates, route), seconds(larger, rates, route)
    assert all(new <= old * (1 + 1e-9) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("route", ROUTINGS, ids=lambda route: route.name)
def test_a_routing_is_a_distribution(route: routing.Routing) -> None:
    assert sum(route.popularity) == pytest.approx(1)
    assert list(route.popularity) == sorted(route.popularity, reverse=True)
    assert (route.served(0), route.served(1)) == (0, 1)
    assert list(route.curve) == sorted(route.curve)


@pytest.mark.parametrize(("experts", "top_k"), [(256, 8), (128, 8), (64, 8), (512, 10)])
def test_the_seed_has_the_skew_it_is_named_for(experts: int, top_k: int) -> None:
    assert routing.seed(experts, top_k).served(0.2) == pytest.approx(0.85, abs=0.02)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 4), (1, 1)])
def test_few_experts_can_only_be_so_skewed(experts: int, top_k: int) -> None:
    assert sum(routing.seed(experts, top_k).popularity) == pytest.approx(1)
    assert routing.seed(experts, top_k).popularity[0] <= 1 / top_k + 1e-9


def test_recorded_usage_is_sorted_over_all_layers() -> None:
    usage = [np.array([6, 0, 2, 0]), np.array([0, 1, 0, 1])]
    assert routing.recorded(usage).served(0.125) == pytest.approx(0.6)
    assert routing.choose(None, usage, 4, 2).name == "seed"  # too few to go by
    with pytest.raises(UsageError, match="no recorded usage"):
        routing.choose("recorded", None, 4, 2)
    with pytest.raises(UsageError, match="choose seed, local"):
        routing.choose("skewed", None, 4, 2)


def test_many_tokens_want_every_expert_and_one_wants_its_own() -> None:
    flat = routing.uniform(64)
    assert distinct(flat, 8, 1) == pytest.approx(8 / 64)
    assert distinct(flat, 8, 10_000) == pytest.approx(1)
    assert distinct(flat, 8, 10_000, kept=0.25) == pytest.approx(0.75)


def test_assumed_rates_stand_in_for_measured_ones() -> None:
    given = parse_assumed("drive=7GB/s, pcie=25gb/s,overhead=80us,gpu_flops=1.5TFLOP/s")
    assert given == {
        "drive": 7e9,
        "pcie": 25e9,
        "overhead": pytest.approx(80e-6),
        "gpu_flops": 1.5e12,
    }
    assert set(KINDS) == set(FASTER)
    assert parse_assumed(None) == {}


@pytest.mark.parametrize(
    "text",
    ["", "drive", "drive=", "drive=7", "drive=0GB/s", "drive=7us", "disk=7GB/s", "drive=1GB/s,"],
)
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--assume"):
        parse_assumed(text)


def test_nothing_is_assumed_twice() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_assumed("drive=1GB/s,drive=2GB/s")
