"""Budgets: what is asked, what this process may use, and the smallest that works."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import Experts, tiny_store

from tierrun.io.errors import BudgetError, UsageError
from tierrun.io.extent import PAGE
from tierrun.io.store import Manifest
from tierrun.tiers.budget import (
    HostMemory,
    TierPlan,
    host_memory,
    plan_tier,
    resolve_ram,
    resolve_vram,
    smallest_budget,
)

GIB = 1 << 30
MEMORY = HostMemory(64 * GIB, 40 * GIB, "this machine's memory")


# -- what is asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "nbytes"), [("0", 0), ("8GiB", 8 * GIB), ("50%", 32 * GIB)])
def test_a_budget_is_bytes_or_a_share_of_memory(text: str, nbytes: int) -> None:
    assert resolve_ram(text, 0, MEMORY).nbytes == nbytes


def test_auto_leaves_room_for_resident_weights_and_the_runtime() -> None:
    budget = resolve_ram("auto", 10 * GIB, MEMORY)
    assert 0 < budget.nbytes < MEMORY.free - 10 * GIB
    assert resolve_ram("auto", 11 * GIB, MEMORY).nbytes < budget.nbytes


def test_auto_is_never_negative() -> None:
    assert resolve_ram("auto", 100 * GIB, MEMORY).nbytes == 0


@pytest.mark.parametrize("text", ["auto", "8GiB", "50%"])
def test_a_budget_says_how_it_came_about(text: str) -> None:
    reason = resolve_ram(text, 0, MEMORY).reason
    assert reason == "as asked" or "this machine's memory" in reason


@pytest.mark.parametrize("text", ["", "half", "-1GiB", "101%", "-1%", "x%", "%", "nan%"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        resolve_ram(text, 0, MEMORY)


def test_the_cpu_has_no_vram_unless_asked() -> None:
    assert resolve_vram("auto", "cpu").nbytes == 0
    assert resolve_vram("1GiB", "cpu").nbytes == GIB


# -- what this process may use -----------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 41943040 kB\n"}


def v2(path: str, limit: int | str, used: int, cache: tuple[int, int] = (0, 0)) -> dict[str, str]:
    stat = f"anon {used}\ninactive_file {cache[0]}\nactive_file {cache[1]}\n"
    directory = f"sys/fs/cgroup/{path}"
    return {
        f"{directory}/memory.max": f"{limit}\n",
        f"{directory}/memory.current": f"{used}\n",
        f"{directory}/memory.stat": stat,
    }


def v1(path: str, limit: int, used: int, cache: int = 0) -> dict[str, str]:
    directory = f"sys/fs/cgroup/memory/{path}"
    return {
        f"{directory}/memory.limit_in_bytes": f"{limit}\n",
        f"{directory}/memory.usage_in_bytes": f"{used}\n",
        f"{directory}/memory.stat": f"total_inactive_file {cache}\ntotal_active_file 0\n",
    }


def in_cgroup(line: str) -> dict[str, str]:
    return MEMINFO | {"proc/self/cgroup": line}


def test_without_cgroups_it_is_the_machines_memory(tmp_path: Path) -> None:
    assert host_memory(tree(tmp_path, MEMINFO)) == MEMORY


def test_a_machine_without_meminfo_still_has_memory(tmp_path: Path) -> None:
    memory = host_memory(tmp_path)
    assert 0 < memory.free < memory.total


def test_a_cgroup_v2_limit_counts(tmp_path: Path) -> None:
    files = in_cgroup("0::/job\n") | v2("job", 8 * GIB, 3 * GIB)
    memory = host_memory(tree(tmp_path, files))
    assert (memory.total, memory.free) == (8 * GIB, 5 * GIB)
    assert "cgroup limit 8.00 GiB" in memory.limit


def test_page_cache_is_not_used_memory(tmp_path: Path) -> None:
    files = in_cgroup("0::/job\n") | v2("job", 8 * GIB, 7 * GIB, cache=(3 * GIB, 2 * GIB))
    assert host_memory(tree(tmp_path, files)).free == 6 * GIB


def test_the_tightest_of_nested_limits_counts(tmp_path: Path) -> None:
    files = in_cgroup("0::/a/b/c\n")
    files |= v2("a/b/c", "max", GIB) | v2("a/b", 6 * GIB, 1 * GIB) | v2("a", 12 * GIB, 11 * GIB)
    memory = host_memory(tree(tmp_path, files))
    assert (memory.total, memory.free) == (6 * GIB, 1 * GIB)


def test_a_limit_beyond_the_machine_is_none(tmp_path: Path) -> None:
    files = in_cgroup("0::/job\n") | v2("job", 1 << 50, GIB)
    assert host_memory(tree(tmp_path, files)) == MEMORY


def test_a_full_cgroup_has_nothing_free(tmp_path: Path) -> None:
    files = in_cgroup("0::/job\n") | v2("job", GIB, 2 * GIB)
    assert host_memory(tree(tmp_path, files)).free == 0


def test_a_cgroup_v1_limit_counts(tmp_path: Path) -> None:
    files = in_cgroup("5:cpu:/job\n4:memory:/job/inner\n0::/\n")
    files |= v1("job", 8 * GIB, 3 * GIB, cache=GIB) | v1("job/inner", 9223372036854771712, GIB)
    memory = host_memory(tree(tmp_path, files))
    assert (memory.total, memory.free) == (8 * GIB, 6 * GIB)


def test_a_container_that_sees_only_its_own_cgroup_has_its_limit(tmp_path: Path) -> None:
    """The path in /proc is the host's, the limit lies at the root of the mount."""
    files = in_cgroup("0::/docker/0123abcd\n") | v2(".", 4 * GIB, GIB)
    assert host_memory(tree(tmp_path, files)).total == 4 * GIB
    files = in_cgroup("4:memory:/docker/0123abcd\n") | v1(".", 2 * GIB, GIB)
    assert host_memory(tree(tmp_path / "v1", files)).total == 2 * GIB


# -- the plan of a tier ------------------------------------------------------------------------

layers_of_stores = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5)).map(
        lambda t: Experts(t[0], min(t[1], t[0]), t[2])
    ),
    min_size=1,
    max_size=5,
)


def manifest_of(layers: Sequence[Experts]) -> Manifest:
    return tiny_store(layers).store.manifest


def slots_of(plan: TierPlan, manifest: Manifest) -> list[int]:
    """Slots that the plan gives to each record class."""
    return [
        plan.extent_classes.count(number) * (plan.extent_bytes // cls.nbytes)
        for number, cls in enumerate(manifest.classes)
    ]


def needs_of(manifest: Manifest) -> list[int]:
    """The top-k plus one read (or all experts) of the hungriest layer of each class."""
    return [
        max(
            min(layer.top_k + 1, len(layer.records))
            for layer in manifest.layers
            if layer.record_class == number
        )
        for number in range(len(manifest.classes))
    ]


def smallest_of(manifest: Manifest) -> int:
    with pytest.raises(BudgetError) as caught:
        plan_tier(0, manifest, landing=True)
    found = re.search(r"the smallest budget that works is (\d+) bytes", str(caught.value))
    assert found is not None
    return int(found[1])


@given(layers_of_stores)
@settings(max_examples=150)
def test_the_smallest_budget_works_and_one_byte_less_does_not(layers: list[Experts]) -> None:
    manifest = manifest_of(layers)
    smallest = smallest_of(manifest)
    assert smallest_budget(manifest) == smallest
    plan = plan_tier(smallest, manifest, landing=True)
    assert plan.nbytes <= smallest
    with pytest.raises(BudgetError, match=f"works is {smallest} bytes"):
        plan_tier(smallest - 1, manifest, landing=True)


@given(layers_of_stores, st.integers(0, 400 * PAGE))
@settings(max_examples=150)
def test_a_larger_budget_works_too_and_is_never_exceeded(layers: list[Experts], more: int) -> None:
    manifest = manifest_of(layers)
    nbytes = smallest_of(manifest) + more
    plan = plan_tier(nbytes, manifest, landing=True)
    assert plan.nbytes <= nbytes
    assert plan.extent_bytes % PAGE == 0
    for slots, need in zip(slots_of(plan, manifest), needs_of(manifest), strict=True):
        assert slots >= need


@given(layers_of_stores, st.integers(0, 400 * PAGE))
def test_a_tier_that_reads_do_not_land_in_may_be_of_any_size(
    layers: list[Experts], nbytes: int
) -> None:
    manifest = manifest_of(layers)
    assert plan_tier(nbytes, manifest, landing=False).nbytes <= nbytes


@given(layers_of_stores)
def test_a_budget_for_all_experts_holds_all_experts(layers: list[Experts]) -> None:
    """And takes little more than their bytes: extents are rounded up, nothing else."""
    manifest = manifest_of(layers)
    plan = plan_tier(1 << 40, manifest, landing=True)
    counts = [0] * len(manifest.classes)
    for layer in manifest.layers:
        counts[layer.record_class] += len(layer.records)
    slots = slots_of(plan, manifest)
    for number, cls in enumerate(manifest.classes):
        assert counts[number] <= slots[number]
        assert slots[number] < counts[number] + plan.extent_bytes // cls.nbytes


def test_most_of_a_budget_becomes_slots() -> None:
    """The cache is not silently half as large as asked."""
    manifest = manifest_of([Experts(64, 4, pages=3)] * 4)
    for pages in range(30, 64 * 4 * 3, 17):
        plan = plan_tier(pages * PAGE, manifest, landing=True)
        slots = sum(slots_of(plan, manifest))
        assert slots * 3 * PAGE >= 0.9 * pages * PAGE - 3 * PAGE
