"""The tiers of an engine, and how far prefill reads ahead in them."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import Experts, tiny_store

from tierrun.io.errors import BudgetError
from tierrun.io.extent import PAGE
from tierrun.tiers.budget import Budget
from tierrun.tiers.setup import make_tiers, prefill_window

STORE = tiny_store([Experts(6, 2, pages=2), Experts(5, 2, pages=3)]).store
MANIFEST = STORE.manifest
SMALLEST = 6 * 3 * PAGE
"""Three slots for each class, in extents of the larger."""


def budget(nbytes: int) -> Budget:
    return Budget(nbytes, "as asked")


def test_reads_land_in_the_warm_tier_and_the_hot_one_may_be_small() -> None:
    hot, warm = make_tiers(MANIFEST, budget(3 * PAGE), budget(SMALLEST))
    assert (hot.num_slots, warm.num_slots) == (1, 6)


def test_reads_land_in_the_hot_tier_where_there_is_no_other() -> None:
    hot, warm = make_tiers(MANIFEST, budget(SMALLEST), budget(0))
    assert (hot.num_slots, warm.num_slots) == (6, 0)


@pytest.mark.parametrize(
    ("vram", "ram", "flag"),
    [
        (0, SMALLEST - 1, "--ram"),
        (SMALLEST - 1, 0, "--vram"),
        (0, 0, "--ram"),
        (1 << 30, 1, "--ram"),
    ],
)
def test_the_tier_that_is_too_small_is_named(vram: int, ram: int, flag: str) -> None:
    with pytest.raises(BudgetError, match=f"^{flag}: .*works is {SMALLEST} bytes"):
        make_tiers(MANIFEST, budget(vram), budget(ram))


def test_each_tier_says_what_it_took_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tierrun"):
        make_tiers(MANIFEST, budget(0), budget(SMALLEST))
    assert "warm tier: 72.0 KiB for 6 of 11 experts (as asked)" in caplog.text
    assert "hot tier" not in caplog.text, "nothing is said of a tier that nobody asked for"


@given(st.integers(SMALLEST, 4 * SMALLEST), st.integers(1, 64))
def test_prefill_never_reads_more_than_half_a_tier_ahead(nbytes: int, depth: int) -> None:
    _, warm = make_tiers(MANIFEST, budget(0), budget(nbytes))
    window = prefill_window(STORE, warm, depth)
    assert 1 <= window <= min(warm.num_slots_of(0), warm.num_slots_of(1)) // 2
