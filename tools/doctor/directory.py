"""A directory for a store: its filesystem, the drive below, and how it can be read."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile

from tierrun.io.drives import drives_of
from tierrun.io.extent import PAGE, format_bytes
from tierrun.io.profiles import WAYS, Profile, ProfileFile
from tierrun.io.reader import direct_obstacle
from tierrun.tools.doctor.drive import Drive, Kind, drive_behind
from tierrun.tools.doctor.files import text
from tierrun.tools.doctor.line import Area, Line
from tierrun.tools.doctor.link import VIRTUAL, link_line, sysfs_link
from tierrun.tools.doctor.mounts import Mount, mount_of
from tierrun.tools.doctor.processor import in_virtual_machine

_LITTLE_SPACE = 1 << 30

_BETTER_DRIVE = "put the store on a local NVMe drive: every expert that no tier holds is read there"
_REMEDIES = {
    Kind.ROTATIONAL: _BETTER_DRIVE,
    Kind.NETWORK: _BETTER_DRIVE,
    Kind.CARD: _BETTER_DRIVE,
    Kind.MEMORY: "put the store on a drive: here it takes the memory that the tiers could use",
}


def directory_lines(directory: Path, root: Path) -> list[Line]:
    """Everything about `directory`; /proc, /sys and /dev are under `root`."""
    area = Area(str(directory))
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "is not there"
        return [area.fail("directory", what, "name another, or make it; mount its drive first")]
    real = directory.resolve()
    mount = _mount(real, root)
    lines = [_filesystem(area, real, mount)]
    if mount is not None:
        drive = drive_behind(mount, root)
        lines += [_drive(area, drive), *_links(area, drive, in_virtual_machine(root))]
    return [*lines, _space(area, real, mount), _direct(area, real), profile_line(area, [real])]


def profile_line(area: Area, directories: Sequence[Path]) -> Line:
    """What reads from the drives of `directories` were measured to give, if anybody has."""
    profile = ProfileFile(drives_of(directories)).read()
    if profile is None:
        return area.ok("profile", "not measured yet")
    return area.ok("profile", f"{_figures(profile)} (GPU: {profile.setting.gpu})")


def _figures(profile: Profile) -> str:
    """The typical bandwidth of each way that was measured."""
    typical = [(way.label, profile.typical(way)) for way in WAYS]
    found = [f"{label} {speed / 1e9:.2f} GB/s" for label, speed in typical if speed is not None]
    return ", ".join(found) or "without a figure"


def _mount(real: Path, root: Path) -> Mount | None:
    device = os.stat(real).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return mount_of(real, number, text(root / "proc/self/mountinfo") or "")


def _filesystem(area: Area, real: Path, mount: Mount | None) -> Line:
    if mount is None:
        return area.unknown("filesystem", "/proc/self/mountinfo does not tell")
    value = f"{mount.filesystem} at {mount.point}"
    if not os.access(real, os.R_OK | os.X_OK):
        advice = "give this user the right to read it (chmod u+rx, chown)"
        return area.fail("filesystem", f"{value}, but the directory cannot be read", advice)
    if mount.read_only:
        return area.ok("filesystem", f"{value}, read-only: stores can be run, not made")
    if not os.access(real, os.W_OK):
        return area.ok(
            "filesystem", f"{value}; this user cannot write: stores can be run, not made"
        )
    return area.ok("filesystem", f"{value}, writable")


def _drive(area: Area, drive: Drive) -> Line:
    if drive.kind in _REMEDIES:
        return area.warn("drive", drive.text, _REMEDIES[drive.kind])
    if drive.kind is Kind.UNKNOWN:
        return area.unknown("drive", drive.text)
    if drive.kind is Kind.VIRTUAL:
        return area.ok("drive", f"{drive.text}; what is below only the host knows")
    return area.ok("drive", drive.text)


def _links(area: Area, drive: Drive, virtual_machine: bool) -> list[Line]:
    """A line for each NVMe drive below."""
    alone = len(drive.controllers) == 1
    excuse = VIRTUAL if virtual_machine else None
    links = {path.name: sysfs_link(path)._replace(excuse=excuse) for path in drive.controllers}
    return [
        link_line(area, "drive link" if alone else f"link {address}", link)
        for address, link in links.items()
    ]


def _space(area: Area, real: Path, mount: Mount | None) -> Line:
    usage = shutil.disk_usage(real)
    if usage.total == 0:
        return area.unknown("free space", "the filesystem tells no size")
    value = f"{format_bytes(usage.free)} of {format_bytes(usage.total)}"
    writable = mount is None or not mount.read_only
    if writable and usage.free < _LITTLE_SPACE:
        return area.warn("free space", value, "make room: a conversion would stop")
    return area.ok("free space", value)


def _direct(area: Area, real: Path) -> Line:
    """Whether O_DIRECT works, by a read of a page."""
    try:
        with _sample(real) as file:
            obstacle = direct_obstacle(file)
    except OSError as error:
        reason = f"no file to try it on, and none can be made ({error.strerror})"
        return area.unknown("direct I/O", reason)
    if obstacle is None:
        return area.ok("direct I/O", "O_DIRECT works")
    return area.warn(
        "direct I/O",
        f"{obstacle}: reads go through the page cache",
        "use a local filesystem (ext4, xfs); in the page cache experts take memory twice",
    )


@contextmanager
def _sample(real: Path) -> Iterator[Path]:
    """A file in `real` of a page at least: a shard, another that is there, or a temporary one.

    Raises:
        OSError: there is none and none can be made.
    """
    there = chain(real.glob("*.safetensors"), real.iterdir())
    found = next((path for path in there if _is_sample(path)), None)
    if found is not None:
        yield found
        return
    with NamedTemporaryFile(dir=real, prefix=".tierrun-doctor-") as file:
        file.write(bytes(PAGE))
        file.flush()
        yield Path(file.name)


def _is_sample(path: Path) -> bool:
    """Not a link, which may lead to another filesystem."""
    if path.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size >= PAGE and os.access(path, os.R_OK)
