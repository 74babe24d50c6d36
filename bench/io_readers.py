"""Every way of reading that `tierrun bench io` knows, opened on some files with buffers to fill.

The readers are the engine's (`tierrun.io`, `tierrun.tiers.staging`), one blocking call per read and
lane: what is measured is the drive and the way to it, without the engine's read queue.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tierrun.bench.io_load import Read
from tierrun.io.direct import read_fully
from tierrun.io.errors import UsageError
from tierrun.io.extent import align_up, format_bytes
from tierrun.io.measuring import Place
from tierrun.io.reader import direct_obstacle, memory_filesystem

if TYPE_CHECKING:
    import torch

    from tierrun.tiers.staging import DeviceReader

READERS = ("direct", "mmap", "mmap-warm", "buffered", "kvikio-compat", "kvikio-gds")
"""`mmap`, `buffered`: from a cold page cache; `mmap-warm`: from one that has it all."""

DEVICE_READERS = ("direct", "kvikio-compat", "kvikio-gds")
"""Those that read into a GPU's memory too, `direct` through pinned memory and a copy."""

COLD = ("mmap", "buffered")
"""Those that must not read a place twice, or the second time measures memory."""

_HUGE_PAGE = 2 << 20


def obstacle(reader: str, path: Path) -> str | None:
    """Why `reader` cannot measure the file at `path`, in a clause; None if it can."""
    if reader == "direct":
        return direct_obstacle(path)
    if reader == "mmap":
        memory = memory_filesystem(path)
        return f"on {memory} nothing is ever cold" if memory else None
    if reader.startswith("kvikio"):
        from tierrun.io.gds import mode, obstacle_to_gds

        found = direct_obstacle(path) or obstacle_to_gds(path)
        if found is None and reader == "kvikio-gds" and not mode().native:
            found = mode().reason
        return found
    return None


class HostBuffers:
    """Memory for all lanes, used by one case after the other.

    In huge pages, and each lane's buffer begins with one, as far as the system has them: into
    small pages, which lie scattered, a drive reads at a half to a third of its speed.
    """

    def __init__(self, nbytes: int) -> None:
        """Of `nbytes` for all lanes, see `needed`.

        Raises:
            UsageError: the system refuses so much memory.
        """
        try:
            self._mapping = mmap.mmap(
                -1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except OSError as error:
            wanted = format_bytes(nbytes)
            raise UsageError(f"{wanted} of buffers are refused ({error.strerror})") from None
        self._mapping.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._memory = memoryview(self._mapping)[-address % _HUGE_PAGE :]
        np.frombuffer(self._memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 1  # so that it is there

    @staticmethod
    def needed(nbytes: int, lanes: int) -> int:
        """What `lanes` buffers of `nbytes` take."""
        return lanes * align_up(nbytes, _HUGE_PAGE)

    def lanes(self, nbytes: int, count: int) -> list[memoryview]:
        """`count` buffers of `nbytes`."""
        stride = align_up(nbytes, _HUGE_PAGE)
        return [self._memory[i * stride : i * stride + nbytes] for i in range(count)]


@contextmanager
def open_to_host(
    reader: str, paths: Sequence[Path], buffers: Sequence[memoryview]
) -> Iterator[Read]:
    """`reader` on `paths`, into a buffer for each lane; they are as long as a read.

    Raises:
        OSError: a file cannot be opened.
        UsageError: no kvikio.
    """
    with ExitStack() as stack:
        fill = _fill(reader, paths, len(buffers), stack)

        def read(lane: int, place: Place) -> None:
            fill(place.shard, place.offset, buffers[lane])

        yield read


_Fill = Callable[[int, int, memoryview], None]


def _fill(reader: str, paths: Sequence[Path], lanes: int, stack: ExitStack) -> _Fill:
    """The blocking call of `reader`, closed with `stack`."""
    if reader in ("direct", "buffered"):
        fds = _open_files(paths, os.O_DIRECT if reader == "direct" else 0, stack)
        return lambda shard, offset, into: read_fully(fds[shard], offset, into)
    if reader.startswith("mmap"):
        from tierrun.io.mapped import MappedReader

        mapped = MappedReader(paths)
        stack.callback(mapped.close)
        return mapped.read
    from tierrun.io.gds import GdsReader

    kvikio = GdsReader(paths, lanes, compat=reader == "kvikio-compat")
    stack.callback(kvikio.close)
    return kvikio.read


def _open_files(paths: Sequence[Path], flags: int, stack: ExitStack) -> list[int]:
    fds = []
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        stack.callback(os.close, fd)
        fds.append(fd)
    return fds


@contextmanager
def open_to_device(
    reader: str, paths: Sequence[Path], nbytes: int, lanes: int, device: "torch.device"
) -> Iterator[Read]:
    """The same into memory of `device`, a buffer for each lane.

    Raises:
        OSError: a file cannot be opened.
        UsageError: no kvikio, or the device has not so much memory.
    """
    import torch

    try:
        memory = torch.empty(lanes, nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        wanted = format_bytes(lanes * nbytes)
        raise UsageError(f"{wanted} of VRAM for buffers are not free; lower --depths") from None
    with ExitStack() as stack:
        opened = _device_reader(reader, paths, lanes, device, stack)

        def read(lane: int, place: Place) -> None:
            opened.read_device(place.shard, place.offset, memory[lane])

        yield read


def _device_reader(
    reader: str, paths: Sequence[Path], lanes: int, device: "torch.device", stack: ExitStack
) -> "DeviceReader":
    if reader != "direct":
        from tierrun.io.gds import GdsReader

        kvikio = GdsReader(paths, lanes, compat=reader == "kvikio-compat")
        stack.callback(kvikio.close)
        return kvikio
    from tierrun.tiers.staging import BounceBuffers, StagedReader

    buffers = BounceBuffers(device, lanes)
    stack.callback(buffers.release)
    staged = StagedReader(paths, buffers, os.O_DIRECT)
    stack.callback(staged.close)
    return staged


def touch(read: Read, places: Sequence[Place]) -> None:
    """Read every place once, so that the page cache has it."""
    for place in places:
        read(0, place)
