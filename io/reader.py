"""What every way of reading a store's shards has in common, and which one is used.

A reader fills buffers from shards; the read queue above it decides what and when. All readers give
the same bytes for the same range (tests/io/test_readers.py).
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from tierrun.io.errors import UsageError
from tierrun.io.extent import PAGE

READERS = ("direct", "mmap", "buffered", "gds")
_MEMORY_FILESYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}


class Reader(Protocol):
    """Reads byte ranges of the shards it was opened on.

    Guarantees: `read` fills the whole of `into` or raises OSError; calls may overlap.
    Assumes: `offset`, `len(into)` and the address of `into` are multiples of `PAGE`; `into` stays
    alive and untouched until `read` returns.
    """

    name: str

    def read(self, shard: int, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` of shard number `shard`; blocks."""

    def close(self) -> None:
        """Close every file; no `read` may be under way."""


class Measured(NamedTuple):
    """The faster way to each destination, and the numbers that say so: `direct` or `gds` into host
    memory, `staged` (direct, pinned memory, copy) or `gds` into a GPU's."""

    to_host: str
    to_device: str
    reason: str


class ReaderChoice(NamedTuple):
    """The reader to use and why; `fallback` when it is not what was asked for."""

    name: str
    reason: str
    fallback: bool


def choose_reader(
    requested: str, paths: Sequence[Path], strict: bool = False, measured: Measured | None = None
) -> ReaderChoice:
    """Decide between `READERS` for the shards at `paths`; `requested` may be `auto`, which is gds
    only where it was `measured` to be faster.

    Raises:
        UsageError: an unknown name, or `strict` and direct I/O or GPUDirect Storage was asked for
            where there is none.
    """
    if requested not in ("auto", *READERS):
        raise UsageError(f"--io {requested}: choose auto, {', '.join(READERS)}")
    if requested in ("mmap", "buffered"):
        return ReaderChoice(requested, "as asked", fallback=False)
    if requested == "gds":
        return _choose_gds(paths, strict)
    obstacle = _first_obstacle(paths)
    if strict and requested == "direct" and obstacle is not None:
        raise UsageError(f"--io direct: {obstacle} (drop --strict to fall back to buffered reads)")
    if obstacle is not None:
        return ReaderChoice("buffered", obstacle, fallback=True)
    if requested == "auto" and measured is not None:
        return ReaderChoice(measured.to_host, measured.reason, fallback=False)
    reason = "as asked" if requested == "direct" else "O_DIRECT works on every directory"
    return ReaderChoice("direct", reason, fallback=False)


def _choose_gds(paths: Sequence[Path], strict: bool) -> ReaderChoice:
    """kvikio, natively or not; what else works where it cannot be used."""
    from tierrun.io.gds import mode, obstacle_to_gds

    obstacle = _first_obstacle(paths) or obstacle_to_gds(paths[0])
    if obstacle is None:
        found = mode()
        if found.native:
            return ReaderChoice("gds", f"as asked; {found.reason}", fallback=False)
        obstacle = found.reason
        instead = ReaderChoice("gds", f"through kvikio without GPUDirect Storage: {obstacle}", True)
    else:
        other = choose_reader("auto", paths)
        instead = ReaderChoice(other.name, f"no GPUDirect Storage: {obstacle}", fallback=True)
    if strict:
        raise UsageError(f"--io gds: {obstacle} (drop --strict to do without)")
    return instead


def open_reader(name: str, paths: Sequence[Path], depth: int) -> Reader:
    """Open the reader called `name` on the shards at `paths`, `depth` reads at once in each of
    their directories."""
    if name == "direct":
        from tierrun.io.direct import DirectReader

        return DirectReader(paths)
    if name == "gds":
        from tierrun.io.gds import GdsReader
        from tierrun.io.spare import SparedReader

        return SparedReader(GdsReader(paths, depth), open_reader("direct", paths, depth))
    if name == "mmap":
        from tierrun.io.mapped import MappedReader

        return MappedReader(paths)
    from tierrun.io.buffered import BufferedReader

    return BufferedReader(paths, depth)


def num_threads(paths: Sequence[Path], depth: int) -> int:
    """Threads that keep `depth` reads going in every directory."""
    return max(1, depth * len({path.parent for path in paths}))


def _first_obstacle(paths: Sequence[Path]) -> str | None:
    for directory in dict.fromkeys(path.parent for path in paths):
        sample = next(path for path in paths if path.parent == directory)
        obstacle = direct_obstacle(sample)
        if obstacle is not None:
            return f"{directory}: {obstacle}"
    return None


def memory_filesystem(path: Path) -> str | None:
    """The type of the file system that `path` lies on, if that keeps files in memory."""
    return _MEMORY_FILESYSTEMS.get(_filesystem_type(path))


def direct_obstacle(path: Path) -> str | None:
    """Why `path` cannot be read past the page cache, or None."""
    memory = memory_filesystem(path)
    if memory is not None:
        return f"{memory} keeps files in memory, there is no direct I/O"
    if not hasattr(os, "O_DIRECT"):
        return "this platform has no O_DIRECT"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        return f"O_DIRECT is refused ({error.strerror})"
    try:
        return _probe(fd)
    finally:
        os.close(fd)


def _probe(fd: int) -> str | None:
    import mmap

    with mmap.mmap(-1, PAGE) as page:
        try:
            os.preadv(fd, [page], 0)
        except OSError as error:
            return f"an O_DIRECT read fails ({error.strerror})"
    return None


def _filesystem_type(path: Path) -> int:
    """`f_type` of statfs(2): new kernels accept O_DIRECT on tmpfs, so opening does not tell."""
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), buffer) != 0:
        return 0
    return int(ctypes.c_long.from_buffer(buffer).value)
