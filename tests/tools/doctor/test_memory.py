"""The lines about host memory, from files of machines that are not this one."""

from pathlib import Path

import pytest
from tests.tools.doctor import trees
from tests.tools.doctor.trees import meminfo, plant

from tierrun.tools.doctor.memory import LockLimit, cgroup, huge_pages, locked_memory, ram, swap

GIB = 1 << 30
V2 = {"proc/self/cgroup": "0::/box\n"}


def limited(nbytes: int, used: int) -> dict[str, str]:
    here = "sys/fs/cgroup/box"
    return V2 | {
        f"{here}/memory.max": f"{nbytes}\n",
        f"{here}/memory.current": f"{used}\n",
        f"{here}/memory.stat": "inactive_file 0\nactive_file 0\n",
    }


def test_ram_says_what_auto_makes_of_it(tmp_path: Path) -> None:
    line = ram(plant(tmp_path, meminfo(64 * GIB, 41 * GIB)))
    assert line.status == "ok"
    assert line.value == "64.00 GiB, 41.00 GiB available; --ram auto: 32.00 GiB at most"


def test_ram_of_which_auto_takes_nothing_warns(tmp_path: Path) -> None:
    assert ram(plant(tmp_path, meminfo(64 * GIB, GIB))).status == "warn"


def test_ram_within_a_cgroup(tmp_path: Path) -> None:
    root = plant(tmp_path, meminfo(64 * GIB, 60 * GIB) | limited(8 * GIB, 2 * GIB))
    assert ram(root).value.startswith("8.00 GiB, 6.00 GiB available (cgroup limit 8.00 GiB); ")
    assert cgroup(root).value == "limit 8.00 GiB, page cache included"


@pytest.mark.parametrize(
    "content", ["", "MemTotal: 5 kB\n", "nothing\n", "MemTotal: 1 kB\nMemAvailable:\n"]
)
def test_memory_that_is_not_told_is_not_guessed(tmp_path: Path, content: str) -> None:
    plant(tmp_path, {"proc/meminfo": content})
    assert ram(tmp_path).status == "unknown"
    assert swap(tmp_path).status == "unknown"


def test_swap(tmp_path: Path) -> None:
    assert swap(plant(tmp_path, meminfo(GIB, GIB))).value == "none"
    plant(tmp_path, meminfo(GIB, GIB, 4 * GIB, 3 * GIB))
    assert swap(tmp_path).value == "4.00 GiB, 1.00 GiB in use"


NO_LIMIT = "no limit below this machine's memory"


@pytest.mark.parametrize(
    ("files", "status"),
    [
        (limited(128 * GIB, 0), "ok"),
        (V2 | {"sys/fs/cgroup/box/memory.max": "max\n"}, "ok"),
        (V2 | {"sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n"}, "ok"),
        (
            {
                "proc/self/cgroup": "4:memory:/box\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            "ok",
        ),
        (V2 | {"sys/fs/cgroup/cgroup.controllers": "cpu pids\n"}, "unknown"),
        (V2, "unknown"),
        ({"sys/fs/cgroup/memory.max": "max\n"}, "unknown"),
    ],
)
def test_no_limit_is_said_only_where_one_would_be_seen(
    tmp_path: Path, files: dict[str, str], status: str
) -> None:
    line = cgroup(plant(tmp_path, meminfo(64 * GIB, 60 * GIB) | files))
    assert line.status == status
    assert (line.value == NO_LIMIT) == (status == "ok")


MIB8 = 8 << 20


@pytest.mark.parametrize(
    ("limit", "capabilities", "value"),
    [
        (LockLimit(None, None), "0", "unlimited"),
        (LockLimit(MIB8, MIB8), "0", "8.0 MiB"),
        (LockLimit(MIB8, None), "0", "8.0 MiB (may be raised to any)"),
        (
            LockLimit(MIB8, MIB8),
            "000001fffeffffff",
            "8.0 MiB, which this process may exceed (CAP_IPC_LOCK)",
        ),
        (LockLimit(MIB8, MIB8), "000001fffeffbfff", "8.0 MiB"),
        (LockLimit(MIB8, MIB8), "what?", "8.0 MiB"),
    ],
)
def test_locked_memory(tmp_path: Path, limit: LockLimit, capabilities: str, value: str) -> None:
    plant(tmp_path, {"proc/self/status": f"Name:\tx\nCapEff:\t{capabilities}\n"})
    line = locked_memory(tmp_path, limit)
    assert (line.status, line.value) == ("ok", f"{value}; not a limit of what CUDA pins")


@pytest.mark.parametrize(
    ("mode", "sized", "status"),
    [
        ("always", "inherit", "ok"),
        ("madvise", "inherit", "ok"),
        ("never", "inherit", "warn"),
        ("never", "madvise", "ok"),
        ("always", "never", "warn"),
    ],
)
def test_huge_pages(tmp_path: Path, mode: str, sized: str, status: str) -> None:
    line = huge_pages(plant(tmp_path, trees.huge_pages(mode, sized)))
    assert line.status == status
    assert line.value == f"transparent, {mode if sized == 'inherit' else sized} (2.0 MiB)"
    where = "" if sized == "inherit" else "hugepages-2048kB/"
    said = f"echo madvise > /sys/kernel/mm/transparent_hugepage/{where}enabled, "
    assert line.advice is None or line.advice.startswith(said)


def test_huge_pages_of_an_older_kernel(tmp_path: Path) -> None:
    assert huge_pages(tmp_path).status == "unknown"
    plant(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never"})
    line = huge_pages(tmp_path)
    assert (line.status, line.value) == ("ok", "transparent, always")


def test_huge_pages_that_are_off_for_this_process(tmp_path: Path) -> None:
    plant(tmp_path, trees.huge_pages("always") | {"proc/self/status": "THP_enabled:\t0\n"})
    assert huge_pages(tmp_path).status == "warn"
