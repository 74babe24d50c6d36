"""A file to read from where a directory holds no store: incompressible, and gone however we end.

The file has no name: it is made with O_TMPFILE or, where the file system has none, unlinked before
the first byte is written. The system frees it when the last process that has it open ends, by
whatever: no signal, not even SIGKILL, leaves anything behind. Others open it as /proc/PID/fd/N.
"""

import errno
import itertools
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from tierrun.io.errors import DiskFullError, TierrunError, UsageError
from tierrun.io.extent import PAGE, format_bytes
from tierrun.io.reader import memory_filesystem

USUAL_BYTES = 8 << 30
"""More than drives and controllers cache."""

_USUAL_MEMORY_BYTES = 1 << 30
"""On a file system in memory, which there is no cache to beat for."""

_LEAST_USEFUL = 256 << 20
_BLOCK_BYTES = 8 << 20
_WRITERS = 4
_FULL = (errno.ENOSPC, errno.EDQUOT)
_GOLDEN = 0x9E3779B97F4A7C15
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
"""What file systems without O_TMPFILE say, and kernels."""

Progress = Callable[[int, int], None]
"""Called with the bytes written and all bytes, from any thread."""


@contextmanager
def nameless_file(directory: Path, asked: int | None, progress: Progress) -> Iterator[Path]:
    """A file of `asked` bytes in `directory`, or of a usual size; where to open it while it lasts.

    Raises:
        UsageError: no such directory, or it cannot be written.
        DiskFullError: no room; says asked and free.
        TierrunError: the drive failed.
    """
    nbytes = _room(directory, asked)
    fd = _open_nameless(directory)
    try:
        _fill(directory, fd, nbytes, progress)
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)


def _room(directory: Path, asked: int | None) -> int:
    """How large the file becomes: what was asked for, or at most a quarter of what is free."""
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory")
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    usual = USUAL_BYTES if memory_filesystem(directory) is None else _USUAL_MEMORY_BYTES
    wanted = min(usual, free // 4) if asked is None else asked
    if asked is None and wanted < _LEAST_USEFUL:
        raise DiskFullError(
            f"{directory}: no room for a test file: a quarter of the {format_bytes(free)} free is "
            f"less than {format_bytes(_LEAST_USEFUL)}; make room, or ask for less with --size"
        )
    if wanted > free:
        raise DiskFullError(
            f"{directory}: a test file of {wanted} bytes ({format_bytes(wanted)}) was asked for, "
            f"{free} bytes ({format_bytes(free)}) are free; make room or lower --size"
        )
    return wanted // PAGE * PAGE


def _open_nameless(directory: Path) -> int:
    """A new file without a name, opened for direct writes where the file system has them."""
    try:
        try:
            return _with_direct(lambda flags: os.open(directory, os.O_TMPFILE | flags, 0o600))
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        return _unlinked(directory)
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be written ({error.strerror}), and it holds no store to read; "
            "choose another --nvme-dir"
        ) from None


def _unlinked(directory: Path) -> int:
    fd, name = tempfile.mkstemp(prefix=".tierrun-bench-", dir=directory)
    try:
        return _with_direct(lambda flags: os.open(name, flags))
    finally:
        os.unlink(name)
        os.close(fd)


def _with_direct(open_with: Callable[[int], int]) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    with suppress(OSError):
        return open_with(flags | os.O_DIRECT)
    return open_with(flags)


def _fill(directory: Path, fd: int, nbytes: int, progress: Progress) -> None:
    """Write `nbytes`, several blocks at once, and wait until the drive has them."""
    try:
        os.ftruncate(fd, nbytes)
        writing = _Writing(fd, nbytes, progress)
        with ThreadPoolExecutor(_WRITERS, "tierrun-testfile") as pool:
            try:
                for done in [pool.submit(writing.run) for _ in range(_WRITERS)]:
                    done.result()
            finally:
                writing.stopped = True  # one failed, or we are told to end: nobody wants the rest
        os.fsync(fd)
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                f"{directory}: the disk became full while a test file of {nbytes} bytes "
                f"({format_bytes(nbytes)}) was written; lower --size"
            ) from None
        raise TierrunError(
            f"{directory}: writing the test file failed ({error.strerror})"
        ) from None


class _Writing:
    """Blocks of a file, dealt to as many threads as call `run`."""

    def __init__(self, fd: int, nbytes: int, progress: Progress) -> None:
        self._fd, self._nbytes, self._progress = fd, nbytes, progress
        self._starts = itertools.count(0, _BLOCK_BYTES)
        self._written = itertools.count(1)
        self._random = np.frombuffer(os.urandom(_BLOCK_BYTES), dtype=np.uint64)
        self.stopped = False

    def run(self) -> None:
        """Write blocks until there are none left, or `stopped`."""
        memory = mmap.mmap(-1, _BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block, data = np.frombuffer(memory, dtype=np.uint64), memoryview(memory)
        while not self.stopped and (start := next(self._starts)) < self._nbytes:
            # Every block is another, so that nothing on the way can store one for all.
            np.bitwise_xor(self._random, np.uint64((start + 1) * _GOLDEN % 2**64), out=block)
            self._write(data[: self._nbytes - start], start)
            self._progress(min(self._nbytes, next(self._written) * _BLOCK_BYTES), self._nbytes)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)
