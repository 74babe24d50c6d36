"""Host memory: how much of it this process may use, and how it gets it."""

from pathlib import Path
from typing import NamedTuple

from tierrun.io.extent import format_bytes
from tierrun.tiers.budget import cgroups, host_memory, resolve_ram
from tierrun.tools.doctor.files import chosen, fields, number, text
from tierrun.tools.doctor.line import Area, Line

MEMORY = Area("memory")

_CAP_IPC_LOCK = 1 << 14


class LockLimit(NamedTuple):
    """RLIMIT_MEMLOCK: soft and hard limit in bytes; None: unlimited."""

    soft: int | None
    hard: int | None


def memory_lines(root: Path, lock_limit: LockLimit) -> list[Line]:
    """Everything about host memory."""
    lock = locked_memory(root, lock_limit)
    return [ram(root), swap(root), cgroup(root), lock, huge_pages(root)]


def lock_limit() -> LockLimit:
    """This process's, as `ulimit -l` shows it (there in KiB)."""
    import resource  # not on every platform

    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return LockLimit(*(None if n == resource.RLIM_INFINITY else n for n in limits))


def ram(root: Path) -> Line:
    """All memory, what is available of it, and what `--ram auto` makes of that."""
    if None in (_kibibytes(root, "MemTotal"), _kibibytes(root, "MemAvailable")):
        return MEMORY.unknown("RAM", "/proc/meminfo does not tell")
    memory = host_memory(root)
    auto = resolve_ram("auto", 0, memory).nbytes
    value = f"{format_bytes(memory.total)}, {format_bytes(memory.free)} available"
    value += f" ({memory.limit})" if _is_limited(root) else ""
    if auto == 0:
        return MEMORY.warn("RAM", value, "--ram auto keeps no expert in it; free some memory")
    return MEMORY.ok("RAM", f"{value}; --ram auto: {format_bytes(auto)} at most")


def _is_limited(root: Path) -> bool:
    return host_memory(root).limit.startswith("cgroup")


def swap(root: Path) -> Line:
    """How much swap there is, and how much of it is taken."""
    total, free = _kibibytes(root, "SwapTotal"), _kibibytes(root, "SwapFree")
    if total is None or free is None:
        return MEMORY.unknown("swap", "/proc/meminfo does not tell")
    if total == 0:
        return MEMORY.ok("swap", "none")
    return MEMORY.ok("swap", f"{format_bytes(total)}, {format_bytes(total - free)} in use")


def _kibibytes(root: Path, name: str) -> int | None:
    """A size in /proc/meminfo, in bytes."""
    words = fields(root / "proc/meminfo").get(name, "").split()
    return int(words[0]) * 1024 if words and words[0].isdecimal() else None


def cgroup(root: Path) -> Line:
    """The memory limit of this process's cgroups, ancestors included."""
    if _is_limited(root):
        memory = host_memory(root)
        return MEMORY.ok("cgroup", f"limit {format_bytes(memory.total)}, page cache included")
    if not any(map(_accounts_memory, cgroups(root, "memory"))):
        return MEMORY.unknown("cgroup", "no memory cgroup is to be seen here")
    return MEMORY.ok("cgroup", "no limit below this machine's memory")


def _accounts_memory(directory: Path) -> bool:
    """Whether a cgroup's directory is there and would show a limit if it had one."""
    files = (directory / name for name in ("memory.max", "memory.limit_in_bytes"))
    controllers = text(directory / "cgroup.controllers") or ""
    return "memory" in controllers.split() or any(file.is_file() for file in files)


def locked_memory(root: Path, limit: LockLimit) -> Line:
    """`ulimit -l`. It limits mlock, which tierrun does not call, and not what CUDA pins."""
    shown = "unlimited" if limit.soft is None else format_bytes(limit.soft)
    if limit.soft is not None and limit.hard != limit.soft:
        shown += f" (may be raised to {'any' if limit.hard is None else format_bytes(limit.hard)})"
    if limit.soft is not None and _effective_capabilities(root) & _CAP_IPC_LOCK:
        shown += ", which this process may exceed (CAP_IPC_LOCK)"
    return MEMORY.ok("ulimit -l", f"{shown}; not a limit of what CUDA pins")


def _effective_capabilities(root: Path) -> int:
    listed = fields(root / "proc/self/status").get("CapEff", "")
    try:
        return int(listed, 16)
    except ValueError:
        return 0


def huge_pages(root: Path) -> Line:
    """Whether memory comes in huge pages where it is asked for, as tierrun does."""
    here = root / "sys/kernel/mm/transparent_hugepage"
    if chosen(here / "enabled") is None:
        return MEMORY.unknown("huge pages", f"no {Path('/', here.relative_to(root))} here")
    size = number(here / "hpage_pmd_size") or 0
    sized = here / f"hugepages-{size // 1024}kB/enabled"
    own = chosen(sized)
    deciding = here / "enabled" if own in (None, "inherit") else sized
    value = f"transparent, {chosen(deciding)}" + (f" ({format_bytes(size)})" if size else "")
    if fields(root / "proc/self/status").get("THP_enabled") == "0":
        advice = "start tierrun from a process that has not disabled them (prctl)"
        return MEMORY.warn("huge pages", f"{value}, but disabled for this process", advice)
    if chosen(deciding) == "never":
        return MEMORY.warn(
            "huge pages",
            value,
            f"echo madvise > {Path('/', deciding.relative_to(root))}, as root: into small pages "
            "drives read at a third of their speed",
        )
    return MEMORY.ok("huge pages", value)
