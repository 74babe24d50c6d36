"""Which filesystem a directory is on, as /proc/self/mountinfo tells."""

import re
from pathlib import Path
from typing import NamedTuple

_ESCAPE = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """A line of mountinfo: the device's number (`259:1`), where it is mounted and how, and what."""

    number: str
    point: Path
    options: frozenset[str]
    filesystem: str
    source: str

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written, whoever asks."""
        return "ro" in self.options


def mount_of(directory: Path, device: str, mountinfo: str) -> Mount | None:
    """What is mounted where `directory` (absolute, without links) is; None if that is not told.

    `device` is the directory's own number. It tells apart mounts of which one hides the other; of a
    btrfs subvolume it is in no line, and the innermost mount is taken.
    """
    mounts = [_parse(line) for line in mountinfo.splitlines()]
    over = [m for m in mounts if m is not None and _holds(m.point, directory)]
    matching = [m for m in over if m.number == device] or over
    deepest = max((len(m.point.parts) for m in matching), default=0)
    return next((m for m in reversed(matching) if len(m.point.parts) == deepest), None)


def _holds(point: Path, directory: Path) -> bool:
    return point == directory or point in directory.parents


def _parse(line: str) -> Mount | None:
    before, separator, after = line.partition(" - ")
    head, tail = before.split(), after.split()
    if not separator or len(head) < 6 or len(tail) < 2:
        return None
    options = frozenset(",".join([head[5], *tail[2:3]]).split(","))
    return Mount(head[2], Path(_plain(head[4])), options, tail[0], _plain(tail[1]))


def _plain(escaped: str) -> str:
    r"""`\040` is a blank, in mountinfo."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), escaped)
