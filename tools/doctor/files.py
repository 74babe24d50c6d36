"""Small files of /proc and /sys, any of which may be missing or refused."""

import re
from pathlib import Path

_CPU_LIST = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*")
_DECIMAL = re.compile(r"[0-9]{1,20}")
_CHOSEN = re.compile(r"\[(\S+)\]")


def text(path: Path) -> str | None:
    """What the file holds, stripped; None where it cannot be read or is empty."""
    try:
        return path.read_text(errors="replace").strip() or None
    except (OSError, ValueError):  # ValueError: a path that cannot be, made of what a file holds
        return None


def number(path: Path) -> int | None:
    """The decimal number that the file holds; None where it holds none."""
    found = text(path)
    return int(found) if found is not None and _DECIMAL.fullmatch(found) else None


def chosen(path: Path) -> str | None:
    """The choice that is in force: `madvise` in `always [madvise] never`."""
    match = _CHOSEN.search(text(path) or "")
    return match[1] if match else None


def fields(path: Path) -> dict[str, str]:
    """`name: value` lines, the first of each name; empty where the file cannot be read."""
    found: dict[str, str] = {}
    for line in (text(path) or "").splitlines():
        name, separator, value = line.partition(":")
        if separator:
            found.setdefault(name.strip(), value.strip())
    return found


def cpu_list(listed: str) -> frozenset[int]:
    """`0-2,8` → {0, 1, 2, 8}, the form in which the kernel lists CPUs; empty for anything else."""
    if not _CPU_LIST.fullmatch(listed):
        return frozenset()
    found: set[int] = set()
    for part in listed.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
