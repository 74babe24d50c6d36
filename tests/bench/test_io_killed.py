"""`tierrun bench io` as a process of its own: ended by signals at any moment, and on bad mounts."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tierrun.bench import fio
from tierrun.bench.documents import read_document

ENDLESS = ("--size", "48MiB", "--sizes", "300KB", "--depths", "4", "--rounds", "100000")
TIERRUN = (sys.executable, "-m", "tierrun", "bench", "io")


def start(directory: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [*TIERRUN, "--nvme-dir", str(directory), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def holders(directory: Path) -> dict[int, int]:
    """The processes that have a file in `directory` open, named or not, and its bytes."""
    found = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link).startswith(f"{directory}/"):
                found[int(link.parts[2])] = link.stat().st_blocks * 512
        except OSError:  # the process, or its file, is gone by now
            continue
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def is_writing(process: "subprocess.Popen[str]", directory: Path) -> bool:
    return process.pid in holders(directory)


def check_gone(process: "subprocess.Popen[str]", directory: Path) -> tuple[int, str]:
    """The process ends, and nobody has its file any more; its exit code and what it said."""
    _, error = process.communicate(timeout=60)
    wait_for(lambda: not holders(directory))
    assert list(directory.iterdir()) == []
    assert "Traceback" not in error
    return process.returncode, error


SIGNALS = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGHUP: 129,
    signal.SIGKILL: -signal.SIGKILL,
}


@pytest.mark.parametrize("number", SIGNALS)
def test_while_it_measures(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, *ENDLESS, "--readers", "buffered")
    wait_for(lambda: holders(tmp_path).get(process.pid, 0) >= 48 << 20)
    time.sleep(0.3)
    assert list(tmp_path.iterdir()) == [], "a file with a name could be left behind"
    process.send_signal(number)
    assert check_gone(process, tmp_path)[0] == SIGNALS[number]


@pytest.mark.parametrize("number", SIGNALS)
def test_while_it_writes_its_file(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, *ENDLESS[2:], "--size", "512MiB")
    wait_for(lambda: is_writing(process, tmp_path))
    process.send_signal(number)
    assert check_gone(process, tmp_path)[0] == SIGNALS[number]


def test_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(6):
        process = start(tmp_path, *ENDLESS)
        time.sleep(chance.uniform(0.1, 1.2))
        process.send_signal(chance.choice([signal.SIGINT, signal.SIGTERM]))
        process.communicate(timeout=60)
        wait_for(lambda: not holders(tmp_path))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_was_measured_is_delivered(number: signal.Signals, tmp_path: Path) -> None:
    """Table, note and files, of a run that would take days."""
    directory, lines = tmp_path / "drive", list[str]()
    directory.mkdir()
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "md")}
    wanted = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    process = start(directory, *ENDLESS, "--readers", "buffered,mmap-warm", *wanted)
    assert process.stderr is not None
    while len(lines) < 3:
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == SIGNALS[number]
    assert "] round 1 of 100000, 1 of 2: " in lines[0] and "GB/s; about" in lines[0]
    assert "] round 2 of 100000, 1 of 2: " in lines[2]
    assert "told to end after " in printed and " of 200000 measurements" in printed
    results = read_document(files["json"]).results
    assert [cell.key["reader"] for cell in results.cells] == ["buffered", "mmap-warm"]
    assert min(len(cell.samples["bandwidth"]) for cell in results.cells) >= 1
    assert "told to end" in files["md"].read_text()
    assert len(files["csv"].read_text().splitlines()) == 3
    assert list(directory.iterdir()) == [] and not holders(directory)


@pytest.mark.skipif(fio.obstacle() is not None, reason=str(fio.obstacle()))
def test_whole_rounds_against_fio_are_delivered(tmp_path: Path) -> None:
    directory, file = tmp_path / "drive", tmp_path / "out.json"
    directory.mkdir()
    more = ("--size", "48MiB", "--sizes", "300KB", "--depths", "2,4", "--duration", "0.1")
    process = start(directory, "--vs-fio", *more, "--rounds", "1", "--json", str(file))
    assert process.stderr is not None
    assert "1 of 2, " in process.stderr.readline()
    process.send_signal(signal.SIGTERM)  # fio has more than a second to go
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == SIGNALS[signal.SIGTERM]
    assert "told to end after 1 of 2 cells" in printed
    (agreement,) = read_document(file).results.details["agreement"]
    assert agreement["rounds"] == 1 and agreement["key"]["depth"] == 2
    assert list(directory.iterdir()) == [] and not holders(directory)


@pytest.mark.skipif(fio.obstacle() is not None, reason=str(fio.obstacle()))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_while_fio_reads(number: signal.Signals, tmp_path: Path) -> None:
    """fio has the file open too: it is ended as well, or ends by itself, and soon."""
    process = start(tmp_path, *ENDLESS, "--vs-fio", "--duration", "2")
    wait_for(lambda: len(holders(tmp_path)) == 2)
    process.send_signal(number)
    assert check_gone(process, tmp_path)[0] == SIGNALS[number]


def test_it_ends_by_itself(tmp_path: Path) -> None:
    process = start(tmp_path, *ENDLESS[:-1], "1", "--readers", "buffered", "--duration", "0.01")
    assert check_gone(process, tmp_path)[0] == 0


# -- mounts that cannot be used -----------------------------------------------------------------


def on_mount(options: str, directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run it with a tmpfs on `directory` that nobody else sees."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("mounts want root")
    mount = f"mount -t tmpfs -o {options} tierrun-test {directory}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounts are not permitted here")
    return _in_shell(f'{mount} && exec "$@"', directory, arguments)


def _in_shell(
    script: str, directory: Path, arguments: Sequence[str]
) -> "subprocess.CompletedProcess[str]":
    command = [*TIERRUN, "--nvme-dir", str(directory), *arguments]
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command], capture_output=True, text=True
    )


def test_a_read_only_directory(tmp_path: Path) -> None:
    ended = on_mount("ro,size=1g", tmp_path, *ENDLESS)
    assert ended.returncode == 2
    assert f"{tmp_path} cannot be written (Read-only file system)" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_directory_without_room(tmp_path: Path) -> None:
    ended = on_mount("size=32m", tmp_path, *ENDLESS)
    assert ended.returncode == 1
    assert "50331648 bytes (48.0 MiB) was asked for" in ended.stderr
    assert "(32.0 MiB) are free" in ended.stderr


def test_a_memory_file_system(tmp_path: Path) -> None:
    ended = on_mount("size=1g", tmp_path, *ENDLESS[:-1], "1", "--duration", "0.01")
    assert ended.returncode == 0, ended.stderr
    assert "is a tmpfs: this measures memory, not a drive" in " ".join(ended.stdout.split())
