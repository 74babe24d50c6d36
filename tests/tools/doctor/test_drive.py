"""Which mount a directory is on, and what kind of drive is below it."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tools.doctor.trees import HASWELL, PORT, cpuinfo, disk, mountinfo, nvme, plant

from tierrun.tools.doctor.drive import Drive, Kind, drive_behind
from tierrun.tools.doctor.mounts import Mount, mount_of

MACHINE = (
    ("254:0", "/", "ext4", "/dev/vda"),
    ("259:2", "/nvme", "xfs", "/dev/nvme0n1p1"),
    ("0:40", "/nvme/in memory".replace(" ", r"\040"), "tmpfs", "tmpfs"),
    ("0:41", "/data", "btrfs", "/dev/nvme0n1p1"),
)


@pytest.mark.parametrize(
    ("directory", "device", "source"),
    [
        ("/", "254:0", "/dev/vda"),
        ("/home/me", "254:0", "/dev/vda"),
        ("/nvme/store", "259:2", "/dev/nvme0n1p1"),
        ("/nvmes", "254:0", "/dev/vda"),
        ("/nvme/in memory/x", "0:40", "tmpfs"),
        ("/data/subvolume", "0:77", "/dev/nvme0n1p1"),
    ],
)
def test_the_innermost_mount_is_found(directory: str, device: str, source: str) -> None:
    text = mountinfo(*MACHINE)["proc/self/mountinfo"]
    found = mount_of(Path(directory), device, text)
    assert found is not None and found.source == source


def test_a_mount_that_another_hides_is_not_taken() -> None:
    inner, outer = ("259:1", "/a/b", "ext4", "/dev/x"), ("259:2", "/a", "ext4", "/dev/y")
    text = mountinfo(("254:0", "/", "ext4", "/dev/vda"), inner, outer)["proc/self/mountinfo"]
    found = mount_of(Path("/a/b"), "259:2", text)
    assert found is not None and found.source == "/dev/y"


def test_of_two_mounts_at_a_place_the_later_counts() -> None:
    mounts = [("0:5", "/a", "tmpfs", "first"), ("0:5", "/a", "tmpfs", "second")]
    found = mount_of(Path("/a"), "0:5", mountinfo(*mounts)["proc/self/mountinfo"])
    assert found is not None and found.source == "second"


def test_read_only_is_seen_in_either_place() -> None:
    line = "20 1 8:1 / /a {} - ext4 /dev/sda1 {}"
    for options in (("ro,relatime", "rw"), ("rw", "ro,discard")):
        found = mount_of(Path("/a"), "8:1", line.format(*options))
        assert found is not None and found.read_only
    found = mount_of(Path("/a"), "8:1", line.format("rw", "rw,errors=remount-ro"))
    assert found is not None and not found.read_only


parts = st.lists(st.sampled_from("abc"), max_size=4)


@given(points=st.lists(st.tuples(parts, st.sampled_from(["1:1", "1:2"]))), directory=parts)
def test_no_mount_of_that_device_lies_deeper(
    points: list[tuple[list[str], str]], directory: list[str]
) -> None:
    mounts = [(number, "/" + "/".join(point), "ext4", "/dev/x") for point, number in points]
    where = PurePosixPath("/", *directory)
    found = mount_of(Path(where), "1:1", mountinfo(*mounts)["proc/self/mountinfo"])
    over = [m for m in mounts if where.is_relative_to(m[1])]
    rivals = [m for m in over if m[0] == "1:1"] or over
    if found is None:
        assert not rivals
    else:
        assert where.is_relative_to(found.point)
        assert all(len(Path(m[1]).parts) <= len(found.point.parts) for m in rivals)


@given(text=st.text())
def test_mountinfo_of_any_text_breaks_nothing(text: str) -> None:
    mount_of(Path("/a/b"), "8:1", text)


def behind(
    root: Path, files: Mapping[str, str], number: str, filesystem: str = "ext4", source: str = "x"
) -> Drive:
    """The drive below a mount of device `number` on the machine of `files`."""
    mount = Mount(number, Path("/m"), frozenset({"rw"}), filesystem, source)
    return drive_behind(mount, plant(root, files))


def test_a_partition_of_an_nvme_drive(tmp_path: Path) -> None:
    drive = behind(tmp_path, nvme("nvme0", "1"), "259:2")
    assert (drive.kind, drive.text) == (Kind.NVME, "NVMe, 990 PRO (nvme0n1)")
    assert drive.controllers == ((tmp_path / PORT / "0000:01:00.0").resolve(),)


def test_btrfs_which_has_no_device_of_its_own(tmp_path: Path) -> None:
    drive = behind(tmp_path, nvme("nvme0", "1"), "0:77", "btrfs", "/dev/nvme0n1p1")
    assert drive.kind is Kind.NVME


def test_a_volume_that_is_named_by_a_link(tmp_path: Path) -> None:
    files = stacked("dm-0", {"dm/name": "vg-data"}, "nvme0")
    files |= {"dev/mapper/vg-data": "→ ../dm-0", "dev/dm-0": "", "sys/class/block/dm-0": BLOCK}
    drive = behind(tmp_path, files, "0:77", "btrfs", "/dev/mapper/vg-data")
    assert drive.text == "device mapper vg-data on NVMe, 990 PRO (nvme0n1)"


BLOCK = "→ ../../devices/virtual/block/dm-0"


def stacked(name: str, words: Mapping[str, str], *below: str) -> dict[str, str]:
    """A device (253:0) on the first partition of each of NVMe drives."""
    here = f"sys/devices/virtual/block/{name}"
    files = {f"{here}/{word}": f"{value}\n" for word, value in words.items()}
    files["sys/dev/block/253:0"] = f"→ ../../devices/virtual/block/{name}"
    for i, drive in enumerate(below):
        address = f"0000:0{i + 1}:00.0"
        files |= nvme(drive, str(10 * i), address)
        part = f"{PORT}/{address}/nvme/{drive}/{drive}n1/{drive}n1p1"
        files[f"{here}/slaves/{drive}n1p1"] = f"→ ../../../../../../{part}"
    return files


def test_a_raid_is_what_it_is_made_of(tmp_path: Path) -> None:
    files = stacked("md0", {"md/level": "raid0"}, "nvme0", "nvme1")
    drive = behind(tmp_path, files, "253:0")
    assert drive.kind is Kind.NVME and len(drive.controllers) == 2
    assert drive.text == "raid0 on NVMe, 990 PRO (nvme0n1) + NVMe, 990 PRO (nvme1n1)"


def test_an_encrypted_volume(tmp_path: Path) -> None:
    words = {"dm/name": "luks", "dm/uuid": "CRYPT-LUKS2-0"}
    drive = behind(tmp_path, stacked("dm-0", words, "nvme0"), "253:0")
    assert (drive.kind, drive.text[:16]) == (Kind.NVME, "encrypted (luks)")


def test_a_stack_is_as_slow_as_its_slowest(tmp_path: Path) -> None:
    files = stacked("md0", {"md/level": "raid1"}, "nvme0") | disk("sda", "8:0", "1", model="HDD")
    slow = "sys/devices/virtual/block/md0/slaves/sda"
    files[slow] = "→ ../../../../../../sys/devices/pci0000:00/host0/block/sda"
    assert behind(tmp_path, files, "253:0").kind is Kind.ROTATIONAL


def test_nvme_over_a_network(tmp_path: Path) -> None:
    files = nvme("nvme0", "1")
    files[f"{PORT}/0000:01:00.0/nvme/nvme0/transport"] = "tcp\n"
    drive = behind(tmp_path, files, "259:1")
    assert drive.kind is Kind.NETWORK and drive.text.startswith("NVMe over tcp")


def test_nvme_with_several_paths(tmp_path: Path) -> None:
    """The namespace belongs to a subsystem, which links the controllers."""
    subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    controller = f"{PORT}/0000:01:00.0/nvme/nvme0"
    files = {
        f"{controller}/transport": "pcie\n",
        f"{controller}/device": "→ ../..",
        f"{subsystem}/model": "PM9A3\n",
        f"{subsystem}/nvme0": f"→ ../../../../../{controller}",
        f"{subsystem}/nvme0n1/device": "→ ..",
        "sys/dev/block/259:0": f"→ ../../../{subsystem}/nvme0n1",
    }
    drive = behind(tmp_path, files, "259:0")
    assert (drive.kind, drive.text) == (Kind.NVME, "NVMe, PM9A3 (nvme0n1)")
    assert drive.controllers == ((tmp_path / PORT / "0000:01:00.0").resolve(),)


BARE, VIRTUAL = cpuinfo(HASWELL), cpuinfo(f"{HASWELL} hypervisor")


@pytest.mark.parametrize(
    ("files", "kind", "text"),
    [
        (BARE | disk("sda", "8:0", "1", vendor="ATA", model="WD"), "ROTATIONAL", "rotational disk"),
        (BARE | disk("sda", "8:0", "0", vendor="ATA", model="CT"), "SSD", "SSD, ATA CT (sda)"),
        (VIRTUAL | disk("sda", "8:0", "1", vendor="ATA", model="WD"), "UNKNOWN", "ATA WD (sda)"),
        (BARE | disk("sda", "8:0", "1", vendor="ATA", model="QEMU HARDDISK"), "VIRTUAL", "virtual"),
        (VIRTUAL | disk("sda", "8:0", "0", vendor="Msft", model="Virtual Disk"), "VIRTUAL", ""),
        (VIRTUAL | disk("vda", "8:0", "1"), "VIRTUAL", "virtual disk (virtio) vda"),
        (BARE | disk("xvdb", "8:0", "0"), "VIRTUAL", "virtual disk (Xen) xvdb"),
        (BARE | disk("mmcblk0", "8:0", "0"), "CARD", "eMMC or SD card mmcblk0"),
        (BARE | disk("nbd3", "8:0", "0"), "NETWORK", "network block device nbd3"),
        (BARE | disk("zram0", "8:0", "0"), "MEMORY", "compressed memory zram0"),
        (BARE | disk("ram0", "8:0", "0"), "MEMORY", "memory ram0"),
        (BARE | disk("loop1", "8:0", "1"), "UNKNOWN", "loop device (loop1) on a file"),
        (BARE | disk("weird", "8:0", "1"), "UNKNOWN", "disk weird"),
    ],
)
def test_disks(tmp_path: Path, files: Mapping[str, str], kind: str, text: str) -> None:
    """`rotational` is 1 for any virtual disk whose host says nothing, so that it tells nothing."""
    drive = behind(tmp_path, files, "8:0")
    assert drive.kind is Kind[kind] and drive.text.startswith(text)


@pytest.mark.parametrize(
    ("filesystem", "source", "kind", "text"),
    [
        ("tmpfs", "tmpfs", "MEMORY", "memory (tmpfs)"),
        ("nfs4", "server:/x", "NETWORK", "network (nfs4, server:/x)"),
        ("virtiofs", "share", "UNKNOWN", "a directory of the host (virtiofs)"),
        ("overlay", "overlay", "UNKNOWN", "layers of a container or live system (overlay)"),
        ("zfs", "tank/data", "UNKNOWN", "tank/data (zfs)"),
        ("bcachefs", "/dev/sda:/dev/sdb", "UNKNOWN", "/dev/sda:/dev/sdb (bcachefs)"),
        ("ext4", "/dev/gone", "UNKNOWN", "/dev/gone (ext4)"),
    ],
)
def test_filesystems_without_a_block_device(
    tmp_path: Path, filesystem: str, source: str, kind: str, text: str
) -> None:
    drive = behind(tmp_path, {}, "0:50", filesystem, source)
    assert (drive.kind, drive.text) == (Kind[kind], text)
