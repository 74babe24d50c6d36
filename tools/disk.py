"""Room on the target disks, and what the operating system says when there is none."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tierrun.io.errors import DiskFullError, TierrunError, UsageError
from tierrun.io.extent import format_bytes
from tierrun.tools.layout import Layout

_FULL = (errno.ENOSPC, errno.EDQUOT)


def shard_paths(layout: Layout, directories: Sequence[Path]) -> tuple[Path, ...]:
    """Where each shard of `layout` is written."""
    shards = zip(layout.manifest.shards, layout.homes, strict=True)
    return tuple(directories[home] / shard.name for shard, home in shards)


def check_space(layout: Layout, directories: Sequence[Path]) -> None:
    """Whether what is still to be written fits.

    Raises:
        DiskFullError: it does not; with the bytes needed and free.
    """
    for directory, needed in _needed(layout, directories).items():
        if needed > _free(directory):
            raise _disk_full(directory, needed)


@contextmanager
def disk_errors(layout: Layout, directories: Sequence[Path]) -> Iterator[None]:
    """Turns the operating system's errors into ours.

    Raises:
        DiskFullError: no space left; everything journaled stays and is continued.
        UsageError: a directory cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            needs = _needed(layout, directories)
            tightest = max(needs, key=lambda directory: needs[directory] - _free(directory))
            raise _disk_full(tightest, needs[tightest]) from None
        raise unwritable(directories[0], error) from None


def unwritable(directory: Path, error: OSError) -> TierrunError:
    """The error for a directory that cannot be created or written."""
    where = error.filename or directory
    return UsageError(f"{where} cannot be written ({error.strerror}); choose another --nvme-dir")


def _disk_full(directory: Path, needed: int) -> DiskFullError:
    free = _free(directory)
    return DiskFullError(
        f"{directory}: disk full: {needed} bytes ({format_bytes(needed)}) still needed, {free} "
        f"({format_bytes(free)}) free; make room and run the same command again, it continues"
    )


def _needed(layout: Layout, directories: Sequence[Path]) -> dict[Path, int]:
    """Bytes still to be allocated, by the first directory of each file system."""
    by_device: dict[int, Path] = {}
    needed: dict[Path, int] = {}
    for directory in directories:
        first = by_device.setdefault(directory.stat().st_dev, directory)
        needed.setdefault(first, 0)
    shards = zip(layout.manifest.shards, shard_paths(layout, directories), strict=True)
    for shard, path in shards:
        needed[by_device[path.parent.stat().st_dev]] += max(0, shard.nbytes - _allocated(path))
    index = 2 * len(layout.manifest.to_json())  # the journal while writing, then store.json
    needed[directories[0]] += index
    return needed


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _free(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
