"""A memory cgroup around a child process: a machine with less memory than this one has.

The limit counts everything the child makes the kernel keep for it, page cache included. Works with
cgroup v1 (`/sys/fs/cgroup/memory`) and v2, as root.
"""

import errno
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tierrun.io.errors import UsageError

_ROOT = Path("/sys/fs/cgroup")
_REMOVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Files:
    """What a version of cgroups calls the same things."""

    limit: str
    peak: str
    events: str


_V1 = _Files("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.failcnt")
_V2 = _Files("memory.max", "memory.peak", "memory.events")


@dataclass(frozen=True, slots=True)
class CgroupUsage:
    """The most that was in use, page cache included, and how often the limit was hit.

    Hitting the limit is no failure: the kernel then drops page cache before it kills.
    """

    limit_bytes: int
    peak_bytes: int
    limit_hits: int
    killed: int


class MemoryCgroup:
    """One cgroup; made by `memory_cgroup`."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory, self._limit_bytes = directory, limit_bytes
        self._files = _V1 if (directory / _V1.limit).exists() else _V2

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, wrapped so that it runs inside from its first instruction."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", script, str(self._directory / "cgroup.procs"), *command]

    def usage(self) -> CgroupUsage:
        """The figures so far."""
        peak = int((self._directory / self._files.peak).read_text())
        events = self._directory / self._files.events
        hits = int(events.read_text()) if self._files is _V1 else _row(events, "max")
        control = self._directory / "memory.oom_control"
        killed = _row(control if self._files is _V1 else events, "oom_kill")
        return CgroupUsage(self._limit_bytes, peak, hits, killed)


def _row(path: Path, name: str) -> int:
    """The number beside `name` in a file of such rows; 0 where the kernel does not say."""
    rows = dict(line.split() for line in path.read_text().splitlines())
    return int(rows.get(name, 0))


@contextmanager
def memory_cgroup(limit_bytes: int, root: Path = _ROOT) -> Iterator[MemoryCgroup]:
    """A fresh cgroup of `limit_bytes`, removed at the end.

    Raises:
        UsageError: no permission, or no memory controller here; says which.
    """
    directory = _parent(root) / f"tierrun-bench-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir()
    except OSError as error:
        raise UsageError(
            f"cannot make the memory cgroup {directory} ({error.strerror}); "
            "run as root, on a machine that delegates cgroups"
        ) from None
    try:
        cgroup = MemoryCgroup(directory, limit_bytes)
        _limit(directory, cgroup._files, limit_bytes)
        yield cgroup
    finally:
        _remove(directory)


def obstacle(root: Path = _ROOT) -> str | None:
    """Why no memory cgroup can be made here, or None."""
    try:
        parent = _parent(root)
    except UsageError as error:
        return str(error)
    return None if os.access(parent, os.W_OK) else f"{parent} is not writable; run as root"


def _parent(root: Path) -> Path:
    if (root / "memory" / _V1.limit).exists():
        return root / "memory"
    controllers = root / "cgroup.controllers"
    if controllers.exists() and "memory" in controllers.read_text().split():
        return root
    raise UsageError(f"no memory cgroup controller under {root}")


def _limit(directory: Path, files: _Files, limit_bytes: int) -> None:
    if files is _V2:
        _enable_controller(directory.parent)
    (directory / files.limit).write_text(str(limit_bytes))
    swap = directory / "memory.swap.max"
    if swap.exists():
        swap.write_text("0")


def _enable_controller(parent: Path) -> None:
    control = parent / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")


def _remove(directory: Path) -> None:
    """The kernel lets go of a cgroup a moment after its last process has ended."""
    deadline = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            directory.rmdir()
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def drop_caches() -> None:
    """Write back and forget the page cache of the whole machine, so that every run starts cold.

    Raises:
        UsageError: not root.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        raise UsageError(f"cannot drop the page cache ({error.strerror}); run as root") from None
