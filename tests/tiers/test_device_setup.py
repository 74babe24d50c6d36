"""The tiers of a GPU, within what it has free."""

import logging
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import Experts, tiny_store
from tests.tiers.vramrig import CPU, CUDA, on_cuda

from tierrun.io.errors import BudgetError, UsageError
from tierrun.io.extent import PAGE
from tierrun.tiers.budget import (
    Budget,
    DeviceFigures,
    DeviceNeeds,
    asked_vram,
    resolve_device_vram,
)
from tierrun.tiers.setup import device_figures, make_device_tiers

GIB = 1 << 30
MEMORY = DeviceFigures(80 * GIB, 70 * GIB, "a GPU")
NEEDS = DeviceNeeds(3 * GIB, 2 * GIB, GIB)

MANIFEST = tiny_store([Experts(6, 2, pages=2), Experts(5, 2, pages=3)]).store.manifest
SMALLEST = 6 * 3 * PAGE
"""Three slots for each class, in extents of the larger."""


def budget(nbytes: int) -> Budget:
    return Budget(nbytes, "as asked")


def test_auto_takes_what_is_free_but_for_everything_else_and_a_reserve() -> None:
    found = resolve_device_vram("auto", MEMORY, NEEDS)
    assert found.nbytes == 70 * GIB - 6 * GIB - int(0.03 * 80 * GIB)
    for said in ("70.00 GiB of 80.00 GiB free on a GPU", "3.00 GiB of resident weights"):
        assert said in found.reason
    assert "2.00 GiB of KV cache, 1.00 GiB of workspace, 2.40 GiB of reserve" in found.reason


def test_a_small_gpu_keeps_a_reserve_too() -> None:
    small = DeviceFigures(4 * GIB, 4 * GIB, "a small GPU")
    found = resolve_device_vram("auto", small, DeviceNeeds(GIB, 0, 0))
    assert found.nbytes == 3 * GIB - (512 << 20)


def test_auto_is_never_negative() -> None:
    assert resolve_device_vram("auto", MEMORY, DeviceNeeds(100 * GIB, 0)).nbytes == 0


@pytest.mark.parametrize(("text", "nbytes"), [("0", 0), ("8GiB", 8 * GIB), ("50%", 40 * GIB)])
def test_a_budget_is_bytes_or_a_share_of_the_gpus_memory(text: str, nbytes: int) -> None:
    assert resolve_device_vram(text, MEMORY, NEEDS).nbytes == asked_vram(text, MEMORY) == nbytes
    assert asked_vram("auto", MEMORY) is None


@pytest.mark.parametrize("text", ["65GiB", "90%", "100%"])
def test_more_than_is_free_is_refused_with_what_is_free(text: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(f"at most {64 * GIB} bytes")) as caught:
        resolve_device_vram(text, MEMORY, NEEDS)
    assert "64.00 GiB that are left (70.00 GiB of 80.00 GiB free on a GPU" in str(caught.value)
    assert resolve_device_vram(str(64 * GIB), MEMORY, NEEDS).nbytes == 64 * GIB


@pytest.mark.parametrize("text", ["", "half", "-1GiB", "101%", "x%"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        resolve_device_vram(text, MEMORY, NEEDS)


@pytest.mark.parametrize(
    ("vram", "ram", "flag"),
    [
        (SMALLEST - 1, SMALLEST, "--vram: "),
        (0, SMALLEST, "--vram: "),
        (SMALLEST, SMALLEST - 1, "--ram, in which reads land: "),
        (SMALLEST, 0, "--ram, in which reads land: "),
    ],
)
def test_both_tiers_must_hold_what_a_layer_needs(vram: int, ram: int, flag: str) -> None:
    with pytest.raises(BudgetError, match=f"^{flag}.*works is {SMALLEST} bytes"):
        make_device_tiers(MANIFEST, budget(vram), budget(ram), CPU, strict=False)


@given(st.integers(SMALLEST, 4 * SMALLEST), st.integers(SMALLEST, 4 * SMALLEST))
def test_no_tier_exceeds_its_budget(vram: int, ram: int) -> None:
    tiers = make_device_tiers(MANIFEST, budget(vram), budget(ram), CPU, strict=False)
    assert tiers.hot.slab.nbytes <= vram and tiers.warm.slab.nbytes <= ram
    assert tiers.none.num_slots == 0
    for tier in (tiers.hot, tiers.warm):
        assert min(tier.num_slots_of(0), tier.num_slots_of(1)) >= 3


@on_cuda
def test_on_a_gpu_the_warm_tier_is_pinned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tierrun"):
        tiers = make_device_tiers(MANIFEST, budget(SMALLEST), budget(SMALLEST), CUDA, strict=True)
    assert tiers.hot.memory(0).is_cuda and tiers.warm.memory(0).is_pinned()
    assert "hot tier: 72.0 KiB for 6 of 11 experts (as asked)" in caplog.text
    tiers.warm.slab.release()


@on_cuda
def test_a_gpu_says_what_it_has() -> None:
    figures = device_figures(CUDA)
    assert 0 < figures.free <= figures.total and figures.name == torch.cuda.get_device_name(CUDA)
