"""Budgets: how many bytes each tier gets, and how they become extents of slots.

`--vram` and `--ram` take `auto`, `0`, `8GiB` or `50%`. Every decision comes with its reason.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tierrun.io.errors import BudgetError, UsageError
from tierrun.io.extent import format_bytes, parse_bytes
from tierrun.io.store import Manifest

EXTENT_BYTES = 128 << 20
"""Upper bound of an extent; smaller budgets get smaller extents."""

_EXTENTS_PER_BUDGET = 32
_AUTO_SHARE = 0.8
_RUNTIME_BYTES = 1 << 30
"""What `auto` leaves for the interpreter, torch, the KV cache and the workspace."""

_WORKSPACE_BYTES = 512 << 20
"""Activations of a prefill, the libraries' own buffers, captured graphs."""

_LEAST_RESERVE = 512 << 20
_RESERVE_SHARE = 0.03
"""What `auto` leaves free on a GPU: for fragmentation, recorded graphs, and others."""


class Budget(NamedTuple):
    """Bytes for one tier, and how that number came about."""

    nbytes: int
    reason: str


class HostMemory(NamedTuple):
    """What this process may use: `total` and `free` bytes, and what set the limit."""

    total: int
    free: int
    limit: str


class DeviceFigures(NamedTuple):
    """The memory of a GPU: `total` and `free` bytes, and its name."""

    total: int
    free: int
    name: str


class DeviceNeeds(NamedTuple):
    """What else will be in a GPU's memory: bytes yet to be allocated."""

    resident_bytes: int
    kv_bytes: int
    workspace_bytes: int = _WORKSPACE_BYTES

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.resident_bytes)} of resident weights, "
            f"{format_bytes(self.kv_bytes)} of KV cache, "
            f"{format_bytes(self.workspace_bytes)} of workspace"
        )


@dataclass(frozen=True, slots=True)
class TierPlan:
    """`extent_classes[i]` is the record class of extent i; all extents have `extent_bytes`."""

    extent_bytes: int
    extent_classes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.extent_bytes * len(self.extent_classes)


def resolve_ram(text: str, resident_bytes: int, memory: HostMemory | None = None) -> Budget:
    """Bytes of host memory for experts.

    `auto` takes most of what is free now (cgroup limits respected) beside the resident weights;
    a percentage is of all memory this process may use.

    Raises:
        UsageError: not a budget.
    """
    memory = memory or host_memory()
    if text == "auto":
        free = memory.free - resident_bytes - _RUNTIME_BYTES
        nbytes = max(0, int(_AUTO_SHARE * free))
        return Budget(
            nbytes,
            f"auto: {_AUTO_SHARE:.0%} of {format_bytes(max(0, free))}, which is "
            f"{format_bytes(memory.free)} free ({memory.limit}) less resident weights and runtime",
        )
    return _explicit(text, memory.total, memory.limit)


def resolve_vram(text: str, device: str) -> Budget:
    """Bytes of the hot tier on the CPU, where it is ordinary memory and `auto` gives it nothing.

    Raises:
        UsageError: not a budget.
    """
    if text == "auto":
        return Budget(0, f"auto: device {device} has no memory of its own")
    memory = host_memory()
    return _explicit(text, memory.total, memory.limit)


def resolve_device_vram(text: str, memory: DeviceFigures, needs: DeviceNeeds) -> Budget:
    """Bytes of a GPU's memory for experts, beside what else it `needs`.

    `auto` takes what is free but for a reserve; a percentage is of all its memory.

    Raises:
        UsageError: not a budget.
        BudgetError: more than is free.
    """
    free = max(0, memory.free - sum(needs))
    said = f"{format_bytes(memory.free)} of {format_bytes(memory.total)} free on {memory.name}"
    if text == "auto":
        reserve = device_reserve(memory.total)
        reason = f"auto: {said}, less {needs}, {format_bytes(reserve)} of reserve"
        return Budget(max(0, free - reserve), reason)
    budget = _explicit(text, memory.total, memory.name)
    if budget.nbytes > free:
        raise BudgetError(
            f"--vram {text}: {format_bytes(budget.nbytes)} are more than the "
            f"{format_bytes(free)} that are left ({said}, less {needs}); "
            f"ask for at most {free} bytes"
        )
    return budget


def asked_vram(text: str, memory: DeviceFigures) -> int | None:
    """Bytes of a GPU's memory that `text` asks for; None for `auto`.

    Raises:
        UsageError: not a budget.
    """
    return None if text == "auto" else _explicit(text, memory.total, memory.name).nbytes


def device_reserve(total: int) -> int:
    """Bytes of a GPU's `total` that are left alone where nobody has asked for them."""
    return max(_LEAST_RESERVE, int(_RESERVE_SHARE * total))


def _explicit(text: str, total: int, limit: str) -> Budget:
    if not text.endswith("%"):
        return Budget(parse_bytes(text), "as asked")
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        raise UsageError(f"{text!r} is not a budget; write auto, 0, 8GiB or 50%") from None
    if not 0 <= share <= 1:
        raise UsageError(f"{text!r} is not a budget: a percentage lies between 0% and 100%")
    return Budget(int(share * total), f"{text} of {format_bytes(total)} ({limit})")


def plan_tier(nbytes: int, manifest: Manifest, *, landing: bool) -> TierPlan:
    """Divide `nbytes` into extents for the store's record classes.

    The landing tier (where reads arrive) must hold each class's top-k plus one read; another
    tier may hold as little as it likes. No tier gets more slots than there are experts.

    Raises:
        BudgetError: the landing tier is too small; says the smallest budget that works.
    """
    sizes = [c.nbytes for c in manifest.classes]
    counts = [0] * len(sizes)
    for layer in manifest.layers:
        counts[layer.record_class] += len(layer.records)
    needs = _needs(manifest) if landing else [0] * len(sizes)
    whole = sum(count * size for count, size in zip(counts, sizes, strict=True))
    for extent_bytes in (_extent_bytes(min(nbytes, whole), max(sizes)), max(sizes)):
        plan = _divide(nbytes, extent_bytes, sizes, counts, needs)
        if plan is not None:
            return plan
    smallest = smallest_budget(manifest)
    raise BudgetError(
        f"{format_bytes(nbytes)} for experts cannot hold one layer's top-k plus one read; "
        f"the smallest budget that works is {smallest} bytes ({format_bytes(smallest)})"
    )


def smallest_budget(manifest: Manifest) -> int:
    """Bytes with which a landing tier holds each class's top-k plus one read."""
    sizes = [c.nbytes for c in manifest.classes]
    pairs = zip(_needs(manifest), sizes, strict=True)
    return max(sizes) * sum(-(-need // (max(sizes) // size)) for need, size in pairs)


def _needs(manifest: Manifest) -> list[int]:
    """Slots that a landing tier must have, by record class."""
    needs = [0] * len(manifest.classes)
    for layer in manifest.layers:
        wanted = min(layer.top_k + 1, len(layer.records))
        needs[layer.record_class] = max(needs[layer.record_class], wanted)
    return needs


def _extent_bytes(nbytes: int, largest: int) -> int:
    """A multiple of the largest record, small enough that a budget has some dozens of them."""
    return largest * max(1, min(EXTENT_BYTES, nbytes // _EXTENTS_PER_BUDGET) // largest)


def _divide(
    nbytes: int,
    extent_bytes: int,
    sizes: Sequence[int],
    counts: Sequence[int],
    needs: Sequence[int],
) -> TierPlan | None:
    """Extents to classes: first what each needs, then by bytes still without a slot."""
    slots = [extent_bytes // size for size in sizes]
    given = [-(-need // per) for need, per in zip(needs, slots, strict=True)]
    left = nbytes // extent_bytes - sum(given)
    if left < 0:
        return None
    while left > 0:
        homeless = [
            max(0, count - extents * per) * size
            for count, extents, per, size in zip(counts, given, slots, sizes, strict=True)
        ]
        if not any(homeless):
            break
        given[homeless.index(max(homeless))] += 1
        left -= 1
    return TierPlan(extent_bytes, tuple(c for c, n in enumerate(given) for _ in range(n)))


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Memory that this process may use, within its cgroups (v1 and v2); files under `root`."""
    total, free = _meminfo(root / "proc/meminfo")
    best = HostMemory(total, free, "this machine's memory")
    for directory in cgroups(root, "memory"):
        found = _cgroup_memory(directory)
        if found is not None and found[0] < total:
            limit, used = found
            best = HostMemory(
                min(best.total, limit),
                min(best.free, max(0, limit - used)),
                f"cgroup limit {format_bytes(min(best.total, limit))}",
            )
    return best


def _meminfo(path: Path) -> tuple[int, int]:
    try:
        rows = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return int(rows["MemTotal"].split()[0]) * 1024, int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, IndexError, ValueError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total // 2


def cgroups(root: Path, controller: str) -> list[Path]:
    """The directories of this process's cgroups with `controller` (`memory`, `cpu`), v1 and v2,
    innermost first, with their ancestors; some may not be there."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controller]
        else:
            continue
        relative = Path(path.lstrip("/"))
        for mount in mounts:
            found += [mount / part for part in (relative, *relative.parents)]
    return found


def _cgroup_memory(directory: Path) -> tuple[int, int] | None:
    """(limit, bytes used and not reclaimable) of a memory cgroup, v2 or v1; None where unlimited.

    Page cache is reclaimed under pressure, so it does not count as used.
    """
    for limit_name, used_name, cache_names in (
        ("memory.max", "memory.current", ("inactive_file", "active_file")),
        (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_inactive_file", "total_active_file"),
        ),
    ):
        try:
            limit = (directory / limit_name).read_text().strip()
            used = int((directory / used_name).read_text())
            rows = (directory / "memory.stat").read_text().splitlines()
            stat = dict(row.split() for row in rows)
            cache = sum(int(stat.get(name, 0)) for name in cache_names)
        except (OSError, ValueError):
            continue
        return (int(limit), max(0, used - cache)) if limit.isdecimal() else None
    return None
