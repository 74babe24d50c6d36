"""Direct reads: O_DIRECT `preadv`, from the drive into the caller's slot.

No page cache, no copy: what is cached is decided by the tiers alone. Some threads that read are
enough to keep one drive busy at megabyte sizes, since `preadv` releases the interpreter lock.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path


class DirectReader:
    """Reads with O_DIRECT; see `Reader`."""

    name = "direct"

    def __init__(self, paths: Sequence[Path]) -> None:
        self._fds = [os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC) for path in paths]

    def read(self, shard: int, offset: int, into: memoryview) -> None:
        """See `Reader`."""
        read_fully(self._fds[shard], offset, into)

    def close(self) -> None:
        """See `Reader`."""
        for fd in self._fds:
            os.close(fd)


def read_fully(fd: int, offset: int, into: memoryview) -> None:
    """Fill `into` from `offset` of the file `fd`.

    Raises:
        OSError: as the system says, or EIO where the file ends early.
    """
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, f"the file ends at byte {offset + done}")
        done += count
