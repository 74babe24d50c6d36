"""Which drives directories lie on, as far as the system tells."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_BLOCK_DEVICES = Path("/sys/dev/block")
_MOUNTS = Path("/proc/self/mountinfo")
_NAMES = ("wwid", "device/wwid", "serial", "device/serial")


class Drive(NamedTuple):
    """Where a drive is now (`259:1`), and what it is: its serial number and what is mounted."""

    number: str
    identity: str


def drives_of(directories: Iterable[Path]) -> tuple[Drive, ...]:
    """The drives under `directories`, each once, in order of their numbers."""
    return tuple(sorted({_drive(directory) for directory in directories}))


def _drive(directory: Path) -> Drive:
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    names = [name for name in (_serial(number), _mounted(number)) if name]
    return Drive(number, " ".join(names) or number)


def _serial(number: str) -> str | None:
    """The name that a drive carries in itself; of a partition, its drive's."""
    here = (_BLOCK_DEVICES / number).resolve()
    for place in (here, here.parent):
        for name in _NAMES:
            found = _text(place / name)
            if found:
                return " ".join(found.split())
    return None


def _mounted(number: str) -> str | None:
    """What is mounted as `number`: type of the file system, and its source."""
    for line in _text(_MOUNTS).splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [number]:
            return " ".join(after.split()[:2])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
