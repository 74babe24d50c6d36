"""The lines about a directory: real ones, on drives that are made of files."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tools.doctor.trees import HASWELL, PORT, cpuinfo, disk, link, mountinfo, nvme, plant

from tierrun.io.drives import drives_of
from tierrun.io.extent import PAGE
from tierrun.io.profiles import DIRECT, GDS_DEVICE, Cell, Profile, ProfileFile, Setting
from tierrun.io.reader import choose_reader
from tierrun.tools.doctor import directory as module
from tierrun.tools.doctor.directory import directory_lines
from tierrun.tools.doctor.line import Line

Examined = Callable[..., dict[str, Line]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No profile of this machine's drives."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def examined(tmp_path: Path, store: Path) -> Examined:
    """The lines about `store`, were it on a drive (8:0 or 259:2) of the machine of `files`."""

    def examined(files: dict[str, str], number: str = "8:0", kind: str = "ext4") -> dict[str, Line]:
        mounted = mountinfo((number, str(store), kind, "somewhere"))
        root = plant(tmp_path / "root", files | mounted)
        return {line.name: line for line in directory_lines(store, root)}

    return examined


def test_a_good_drive(examined: Examined) -> None:
    files = nvme("nvme0", "1")
    files |= link(f"{PORT}/0000:01:00.0", ("16.0 GT/s PCIe", "4"), ("16.0 GT/s PCIe", "4"))
    lines = examined(files, "259:2")
    assert (
        lines["filesystem"].value.startswith("ext4 at /")
        and "writable" in lines["filesystem"].value
    )
    assert (lines["drive"].status, lines["drive"].value) == ("ok", "NVMe, 990 PRO (nvme0n1)")
    assert lines["drive link"].value == "PCIe gen 4 x4, all that the device can do"
    assert lines["profile"].value == "not measured yet"


def test_a_drive_in_too_narrow_a_slot(examined: Examined) -> None:
    files = nvme("nvme0", "1")
    files |= link(f"{PORT}/0000:01:00.0", ("16.0 GT/s PCIe", "2"), ("16.0 GT/s PCIe", "4"))
    assert examined(files, "259:2")["drive link"].status == "warn"


def test_what_a_virtual_machine_shows_of_a_link_is_not_judged(examined: Examined) -> None:
    files = nvme("nvme0", "1") | cpuinfo(f"{HASWELL} hypervisor")
    files |= link(f"{PORT}/0000:01:00.0", ("16.0 GT/s PCIe", "2"), ("16.0 GT/s PCIe", "4"))
    line = examined(files, "259:2")["drive link"]
    assert line.status == "ok" and "virtual machine" in line.value


@pytest.mark.parametrize(
    ("name", "rotational", "kind", "status"),
    [
        ("vda", "1", "ext4", "ok"),
        ("sda", "1", "ext4", "warn"),
        ("sda", "0", "ext4", "ok"),
        ("nbd0", "0", "ext4", "warn"),
        ("loop0", "1", "ext4", "unknown"),
        ("sda", "0", "tmpfs", "warn"),
        ("sda", "0", "nfs4", "warn"),
        ("sda", "0", "overlay", "unknown"),
    ],
)
def test_which_drives_warn(
    name: str, rotational: str, kind: str, status: str, examined: Examined
) -> None:
    assert examined(disk(name, "8:0", rotational), kind=kind)["drive"].status == status


def test_without_mountinfo_nothing_is_guessed(tmp_path: Path, store: Path) -> None:
    lines = {line.name: line for line in directory_lines(store, tmp_path / "nothing")}
    assert lines["filesystem"].status == "unknown" and "drive" not in lines


@pytest.mark.parametrize("name", ["gone", "file"])
def test_what_is_no_directory_fails(name: str, tmp_path: Path) -> None:
    plant(tmp_path, {"file": ""})
    (line,) = directory_lines(tmp_path / name, Path("/"))
    assert line.status == "fail"


def direct(store: Path) -> Line:
    return next(line for line in directory_lines(store, Path("/")) if line.name == "direct I/O")


def test_direct_io_is_as_the_readers_find_it_and_nothing_is_left(store: Path) -> None:
    line = direct(store)
    assert not list(store.iterdir())
    shard = store / "experts.safetensors"
    shard.write_bytes(bytes(PAGE))
    works = not choose_reader("direct", [shard]).fallback
    assert (line.status == "ok") == works
    assert direct(store) == line
    assert list(store.iterdir()) == [shard]


def test_memory_has_no_direct_io(memory_directory: Path) -> None:
    lines = {line.name: line for line in directory_lines(memory_directory, Path("/"))}
    assert lines["direct I/O"].status == lines["drive"].status == "warn"
    assert lines["filesystem"].value.startswith("tmpfs at /dev/shm")
    assert not list(memory_directory.iterdir())


def test_where_nothing_can_be_written_a_shard_is_tried(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module, "NamedTemporaryFile", refuse)
    line = direct(store)
    assert line.status == "unknown" and "Read-only file system" in line.value
    (store / "short.safetensors").write_bytes(b"no page")
    (store / "directory").mkdir()
    (store / "link").symlink_to("/usr/bin/env")
    assert direct(store).status == "unknown"
    (store / "any file").write_bytes(bytes(PAGE))
    assert direct(store).status != "unknown"


def test_space_is_what_a_user_gets(store: Path) -> None:
    """As `df` shows it: without what the filesystem keeps for root."""
    line = next(one for one in directory_lines(store, Path("/")) if one.name == "free space")
    found = os.statvfs(store)
    gib = float(line.value.partition(" GiB of ")[0])
    assert gib == pytest.approx(found.f_bavail * found.f_frsize / 2**30, abs=0.5)


def test_little_space_warns_where_it_is_wanted(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free, total = 1 << 20, 1 << 40

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage)
    assert examined({})["free space"].status == "warn"
    Usage.free = 1 << 30
    assert examined({})["free space"].status == "ok"


def test_a_filesystem_without_size(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc, and some network ones."""

    class Usage:
        free = total = 0

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage)
    assert examined({})["free space"].status == "unknown"


def test_a_profile_that_was_measured_is_shown(store: Path) -> None:
    cells = (Cell(DIRECT, PAGE, 1, 2e9), Cell(DIRECT, PAGE, 4, 8e9), Cell(GDS_DEVICE, PAGE, 1, 5e9))
    setting = Setting(drives="x", gpu="H100", kvikio="26.10", mode="compat")
    ProfileFile(drives_of([store])).write(Profile(setting, cells))
    line = next(one for one in directory_lines(store, Path("/")) if one.name == "profile")
    assert line.value == "direct → RAM 4.00 GB/s, gds → VRAM 5.00 GB/s (GPU: H100)"
