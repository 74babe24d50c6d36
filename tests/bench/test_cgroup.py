"""Memory cgroups: the child is inside, counted, killed beyond the limit; nothing is left behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tierrun.bench.cgroup import CgroupUsage, memory_cgroup, obstacle
from tierrun.io.errors import UsageError

needs_cgroups = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
MIB = 1 << 20


def _allocate(nbytes: int) -> list[str]:
    return [sys.executable, "-c", f"b = b'x' * {nbytes}; print(len(b))"]


def _groups() -> set[Path]:
    return {
        *Path("/sys/fs/cgroup").glob("tierrun-bench-*"),
        *Path("/sys/fs/cgroup/memory").glob("tierrun-bench-*"),
    }


@needs_cgroups
def test_a_child_within_the_limit() -> None:
    with memory_cgroup(128 * MIB) as cgroup:
        run = subprocess.run(cgroup.command(_allocate(40 * MIB)), capture_output=True, text=True)
        usage = cgroup.usage()
    assert run.stdout.strip() == str(40 * MIB), run.stderr
    assert 40 * MIB < usage.peak_bytes <= 128 * MIB
    assert usage.limit_bytes == 128 * MIB
    assert usage.killed == 0


@needs_cgroups
def test_a_child_beyond_the_limit_is_killed() -> None:
    with memory_cgroup(32 * MIB) as cgroup:
        run = subprocess.run(cgroup.command(_allocate(100 * MIB)), capture_output=True)
        usage = cgroup.usage()
    assert run.returncode == -9
    assert usage.killed == 1
    assert usage.limit_hits > 0


@needs_cgroups
def test_the_cgroup_is_removed_whatever_happens() -> None:
    before = _groups()
    with pytest.raises(RuntimeError, match="stop"), memory_cgroup(32 * MIB):
        assert len(_groups()) == len(before) + 1
        raise RuntimeError("stop")
    assert _groups() == before


def test_no_controller_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="no memory cgroup controller"),
        memory_cgroup(MIB, tmp_path),
    ):
        pass
    reason = obstacle(tmp_path)
    assert reason is not None and "no memory cgroup controller" in reason


def test_no_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")

    def refuse(self: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="run as root"), memory_cgroup(MIB, tmp_path):
        pass


def test_version_2_has_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With files that look like a v2 hierarchy, since few machines have both."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    made: list[Path] = []
    mkdir, rmdir = Path.mkdir, shutil.rmtree

    def fill(self: Path) -> None:
        mkdir(self)
        (self / "memory.swap.max").write_text("max")
        (self / "memory.peak").write_text("1234\n")
        (self / "memory.events").write_text("low 0\nmax 7\noom 1\noom_kill 1\n")
        made.append(self)

    monkeypatch.setattr(Path, "mkdir", fill)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    with memory_cgroup(MIB, tmp_path) as cgroup:
        assert (made[0] / "memory.max").read_text() == str(MIB)
        assert (made[0] / "memory.swap.max").read_text() == "0"
        assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
        assert cgroup.usage() == CgroupUsage(MIB, peak_bytes=1234, limit_hits=7, killed=1)
    assert not made[0].exists()
