"""What a filesystem lies on: a drive of which kind, as far as the kernel tells."""

import re
from collections.abc import Iterable
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from tierrun.tools.doctor.files import text
from tierrun.tools.doctor.mounts import Mount
from tierrun.tools.doctor.processor import in_virtual_machine


class Kind(Enum):
    """Of drives; several together are what the latest of theirs in this list is."""

    NVME = auto()
    SSD = auto()
    VIRTUAL = auto()
    UNKNOWN = auto()
    CARD = auto()
    ROTATIONAL = auto()
    NETWORK = auto()
    MEMORY = auto()


class Drive(NamedTuple):
    """What it is, in words, and the PCI devices of the NVMe drives that it is made of."""

    kind: Kind
    text: str
    controllers: tuple[Path, ...] = ()


_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "beegfs", "gpfs", "glusterfs"}
_NETWORK |= {"afs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.glusterfs"}
_FROM_HOST = {"9p", "virtiofs", "vboxsf", "fuse.vmhgfs-fuse", "drvfs", "prl_fs"}
_VIRTUAL_VENDORS = ("QEMU", "VMware", "VBOX", "Msft", "Google", "Xen", "Virtual")
_BY_NAME = {
    "vd": (Kind.VIRTUAL, "virtual disk (virtio)"),
    "xvd": (Kind.VIRTUAL, "virtual disk (Xen)"),
    "mmcblk": (Kind.CARD, "eMMC or SD card"),
    "nbd": (Kind.NETWORK, "network block device"),
    "rbd": (Kind.NETWORK, "Ceph block device"),
    "drbd": (Kind.NETWORK, "DRBD"),
    "zram": (Kind.MEMORY, "compressed memory"),
    "ram": (Kind.MEMORY, "memory"),
    "pmem": (Kind.UNKNOWN, "persistent memory"),
}


def drive_behind(mount: Mount, root: Path) -> Drive:
    """What `mount` lies on; files of /proc, /sys and /dev are under `root`."""
    filesystem = mount.filesystem
    if filesystem in _MEMORY:
        return Drive(Kind.MEMORY, f"memory ({filesystem})")
    if filesystem in _NETWORK:
        return Drive(Kind.NETWORK, f"network ({filesystem}, {mount.source})")
    if filesystem in _FROM_HOST:
        return Drive(Kind.UNKNOWN, f"a directory of the host ({filesystem})")
    if filesystem == "overlay":
        return Drive(Kind.UNKNOWN, "layers of a container or live system (overlay)")
    device = _block_device(mount, root)
    if device is None:
        return Drive(Kind.UNKNOWN, f"{mount.source} ({filesystem})")
    return _drive(device, root)


def _block_device(mount: Mount, root: Path) -> Path | None:
    """Its directory in /sys: by number, else (btrfs has none of its own) by what was mounted."""
    places = [root / "sys/dev/block" / mount.number]
    if mount.source.startswith("/dev/"):
        node = root / mount.source.lstrip("/")
        places += [root / "sys/class/block" / name for name in (node.name, node.resolve().name)]
    return next((place.resolve() for place in places if place.is_dir()), None)


def _drive(device: Path, root: Path) -> Drive:
    """A block device; of a partition, its drive; of a stack, what it is stacked on."""
    if (device / "partition").exists():
        device = device.parent
    below = sorted(path.resolve() for path in (device / "slaves").glob("*"))
    if below:
        return _stack(device, [_drive(path, root) for path in below])
    name = device.name
    if name.startswith("nvme"):
        return _nvme(device)
    if name.startswith("sd"):
        return _scsi(device, in_virtual_machine(root))
    if name.startswith("loop"):
        file = text(device / "loop/backing_file")
        return Drive(Kind.UNKNOWN, f"loop device ({name}) on {file or 'a file'}")
    letters = re.match(r"[a-z]*", name)
    kind, said = _BY_NAME.get(_family(letters[0] if letters else ""), (Kind.UNKNOWN, "disk"))
    return Drive(kind, f"{said} {name}")


def _family(letters: str) -> str:
    """`vdb` is a `vd`; the letters after are the drive's."""
    return next((f for f in sorted(_BY_NAME, key=len) if re.fullmatch(f"{f}[a-z]*", letters)), "")


def _stack(device: Path, members: list[Drive]) -> Drive:
    level, mapped = text(device / "md/level"), text(device / "dm/name")
    said = level or (f"device mapper {mapped}" if mapped else device.name)
    if (text(device / "dm/uuid") or "").startswith("CRYPT"):
        said = f"encrypted ({mapped})"
    kind = max((member.kind for member in members), key=lambda kind: kind.value)
    controllers = tuple(path for member in members for path in member.controllers)
    return Drive(kind, f"{said} on {_join(member.text for member in members)}", controllers)


def _join(texts: Iterable[str]) -> str:
    return " + ".join(texts)


def _nvme(disk: Path) -> Drive:
    """An NVMe namespace; with multipath its device is a subsystem, which links its controllers."""
    device = (disk / "device").resolve()
    places = [device, *sorted(device.glob("nvme[0-9]*"))]
    controllers = [place.resolve() for place in places if (place / "transport").exists()]
    transports = {found for path in controllers if (found := text(path / "transport"))}
    model = text(device / "model")
    said = f"{model or 'NVMe drive'} ({disk.name})"
    over = transports - {"pcie"}
    if over:
        return Drive(Kind.NETWORK, f"NVMe over {', '.join(sorted(over))}, {said}")
    if any(vendor in said for vendor in _VIRTUAL_VENDORS):
        return Drive(Kind.VIRTUAL, f"virtual disk, {said}")
    local = (path / "device" for path in controllers)
    return Drive(Kind.NVME, f"NVMe, {said}", tuple(p.resolve() for p in local if p.is_dir()))


def _scsi(disk: Path, virtual_machine: bool) -> Drive:
    """A disk of SCSI's family (SATA, SAS, USB, iSCSI); in virtual machines `rotational` says
    nothing, it is what a disk is that has not said otherwise."""
    words = [text(disk / "device" / name) for name in ("vendor", "model")]
    said = f"{' '.join(filter(None, words)) or 'disk'} ({disk.name})"
    rotational = text(disk / "queue/rotational")
    if any(part.startswith("session") for part in disk.parts):
        return Drive(Kind.NETWORK, f"iSCSI, {said}")
    if any(vendor in said for vendor in _VIRTUAL_VENDORS):
        return Drive(Kind.VIRTUAL, f"virtual disk, {said}")
    bus = "USB, " if any(re.fullmatch(r"usb\d+", part) for part in disk.parts) else ""
    if rotational == "0":
        return Drive(Kind.SSD, f"SSD, {bus}{said}")
    if rotational == "1" and not virtual_machine:
        return Drive(Kind.ROTATIONAL, f"rotational disk, {bus}{said}")
    return Drive(Kind.UNKNOWN, f"{bus}{said}")
