"""The whole examination: nothing that a machine shows or hides breaks it."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.tools.doctor import trees
from tests.tools.doctor.trees import H100_ADDRESS, PORT, plant

from tierrun.tools.doctor import examine as module
from tierrun.tools.doctor.child import Answer
from tierrun.tools.doctor.drive import drive_behind
from tierrun.tools.doctor.examine import Examination
from tierrun.tools.doctor.facts import Cuda
from tierrun.tools.doctor.gpu import gpu_lines
from tierrun.tools.doctor.line import Area, Line, Report
from tierrun.tools.doctor.machine import Kernel, system_line
from tierrun.tools.doctor.memory import LockLimit, memory_lines
from tierrun.tools.doctor.mounts import mount_of
from tierrun.tools.doctor.processor import processor_lines
from tierrun.tools.doctor.report import render, summary

ROOT = Path(__file__).parents[3]
AREA = Area("somewhere")

SHOWN = (
    trees.cpuinfo(f"{trees.EPYC} hypervisor")
    | trees.topology(["0", "1"])
    | trees.meminfo(1 << 36, 1 << 35)
    | trees.huge_pages("madvise")
    | trees.nvme("nvme0", "1")
    | trees.link(f"{PORT}/0000:01:00.0", ("16.0 GT/s PCIe", "4"), ("16.0 GT/s PCIe", "4"))
    | trees.nvidia_pci()
    | trees.link(f"sys/bus/pci/devices/{H100_ADDRESS}", ("Unknown", "0"), ("2.5 GT/s PCIe", "1"))
    | {
        "proc/driver/nvidia/version": trees.NVIDIA_VERSION,
        "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/\n0::/\n",
        "proc/self/status": "CapEff:\t0\nTHP_enabled:\t1\n",
        "proc/self/mountinfo": trees.mountinfo(("259:2", "/m", "ext4", "/dev/x"))[
            "proc/self/mountinfo"
        ],
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1073741824\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "0\n",
        "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 0\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "1000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "1000\n",
        "sys/devices/system/node/node0/cpulist": "0-1\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "etc/os-release": 'NAME=x\nPRETTY_NAME="A Linux"\n',
        "sys/class/dmi/id/product_name": "A Board\n",
    }
)
FILES = [name for name, content in SHOWN.items() if not content.startswith("→ ")]
H100 = {
    "name": "H100",
    "capability": (9, 0),
    "free": 3,
    "total": 4,
    "address": H100_ADDRESS,
    "obstacle": None,
}
FACTS = Cuda.model_validate(
    {"torch": "2.11", "built_for": "13.0", "supports": 13000, "gpus": [H100]}
)


def everything(root: Path) -> list[Line]:
    """All lines that come from files."""
    mount = mount_of(Path("/m/x"), "259:2", (root / "proc/self/mountinfo").read_text())
    if mount is not None:
        drive_behind(mount, root)
    return [
        system_line(root, Kernel("Linux", "6.1", "x86_64")),
        *processor_lines(root, {0, 1}),
        *memory_lines(root, LockLimit(1 << 23, None)),
        *gpu_lines(root, Answer(FACTS, "")),
    ]


def test_the_machine_of_the_test_is_understood(tmp_path: Path) -> None:
    """So that damage to its files, below, is damage to something that is read."""
    lines = everything(plant(tmp_path, SHOWN))
    values = {line.name: line.value for line in lines}
    assert values["system"] == "A Linux, Linux 6.1, x86_64, A Board, virtual machine"
    assert values["cgroup"] == "limit 1.00 GiB, page cache included"
    assert values["governor"] == "performance (driver not shown)"
    assert values["driver"] == "580.159.04, for CUDA up to 13.0"
    assert {line.name for line in lines if line.status == "unknown"} == {
        "link 0",
        "pinned memory",
        "GDS",
    }


junk = (
    st.sampled_from(["", "\n", "-1", "0", "0 0", "max", "[]", ":", "a: b", "0-", "1" * 40, "é\x00"])
    | st.text()
)


@given(damage=st.dictionaries(st.sampled_from(FILES), st.none() | junk, min_size=1, max_size=6))
def test_files_of_any_content_give_the_same_lines(damage: dict[str, str | None]) -> None:
    """Of other status perhaps; none is missing, and nothing is raised."""
    with TemporaryDirectory() as directory:
        root = plant(Path(directory), SHOWN)
        names = [line.name for line in everything(root)]
        for name, content in damage.items():
            (root / name).write_text(content or "", errors="replace")
            if content is None and name != "proc/self/mountinfo":
                (root / name).unlink()
        assert [line.name for line in everything(root)] == names


# -- areas ----------------------------------------------------------------------------------------


def test_what_breaks_an_area_breaks_only_that(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> list[Line]:
        raise ZeroDivisionError("of all things")

    (line,) = Examination(AREA, broken).lines(time.perf_counter() + 10)
    assert (line.area, line.status) == ("somewhere", "unknown")
    assert "ZeroDivisionError" in line.value


def test_what_hangs_is_not_waited_for() -> None:
    ended = threading.Event()
    examination = Examination(AREA, lambda: [AREA.ok("n", str(ended.wait(30)))])
    started = time.perf_counter()
    (line,) = examination.lines(started + 0.05)
    assert time.perf_counter() - started < 10
    assert line.status == "unknown"
    ended.set()
    examination.join()
    assert examination.lines(0.0)[0].status == "ok"


def test_directories_on_one_drive_have_no_profile_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module._together([tmp_path, tmp_path / "gone"]) == []


def test_directories_on_two_drives_have_a_profile_together(
    tmp_path: Path, memory_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (line,) = module._together([tmp_path, memory_directory])
    assert (line.area, line.name) == ("all directories", "profile")


# -- the report for people ------------------------------------------------------------------------


def printed(lines: list[Line]) -> str:
    console = Console(width=60, record=True, file=open(os.devnull, "w"))
    console.print(render(Report.of(lines, "1.0", 1.25)))
    console.file.close()
    return console.export_text()


def test_the_report_says_what_to_do_below_what_is_wrong() -> None:
    other = Area("/a [bold]directory")
    text = printed([AREA.ok("one", "good"), AREA.warn("two", "[bad]", "do it"), other.ok("x", "y")])
    rows = [row.rstrip() for row in text.splitlines()]
    assert rows[0] == "somewhere"
    assert [row.split() for row in rows[1:4]] == [
        ["ok", "one", "good"],
        ["warn", "two", "[bad]"],
        ["→", "do", "it"],
    ]
    assert rows[4] == "/a [bold]directory"
    assert rows[-1] == "2 ok, 0 unknown, 1 warn, 0 fail (1.2 s)"


def test_a_report_of_nothing() -> None:
    assert summary(Report.of([], "1.0", 0.0)) == "0 ok, 0 unknown, 0 warn, 0 fail (0.0 s)"


# -- the command ----------------------------------------------------------------------------------


def tierrun(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tierrun", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment,
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report about this machine and a directory."""
    done = tierrun("doctor", "--json", "--nvme-dir", str(tmp_path_factory.mktemp("store")))
    report = Report.model_validate_json(done.stdout)
    assert done.returncode == report.exit_code(strict=False), done.stderr
    return report


def test_this_machine_is_examined_in_time(whole: Report) -> None:
    assert whole.seconds < 20
    assert not [line for line in whole.lines if line.name == "examination"]


def test_every_line_is_documented(whole: Report) -> None:
    text = (ROOT / "docs" / "doctor.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    assert {re.sub(r" \d+$", " N", line.name) for line in whole.lines} <= documented


def documented_schema() -> Any:
    text = (ROOT / "docs" / "doctor.md").read_text()
    found = re.search(r"```json\n(\{\n  \"\$defs\".*?)```", text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_schema_is_the_documented_one() -> None:
    done = tierrun("doctor", "--schema")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == documented_schema() == Report.model_json_schema()


def test_what_fails_gives_exit_code_1(tmp_path: Path) -> None:
    done = tierrun("doctor", TIERRUN_NVME_DIR=str(tmp_path / "gone"))
    assert done.returncode == 1, done.stderr
    assert "is not there" in done.stdout and "→ " in done.stdout


def test_what_warns_gives_exit_code_1_if_strict(
    memory_directory: Path, whole: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole.status != "ok":
        pytest.skip("this machine has something wrong by itself")
    arguments = ("doctor", "--nvme-dir", str(memory_directory))
    assert tierrun(*arguments).returncode == 0
    assert tierrun(*arguments, "--strict").returncode == 1


def test_a_store_that_is_named_twice_is_refused() -> None:
    done = tierrun("doctor", "here", "--nvme-dir", "there")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_help_and_examining_import_no_torch() -> None:
    code = (
        "import sys, tierrun.tools.cli; first = 'pydantic' in sys.modules;"
        "import tierrun.tools.doctor.examine; print(first, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        text=True,
        capture_output=True,
    )
    assert done.stdout.strip() == "False False", done.stderr


def test_only_the_child_imports_torch() -> None:
    for path in (ROOT / "tools" / "doctor").glob("*.py"):
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import)]
        assert "torch" not in [alias.name for node in top for alias in node.names], path
