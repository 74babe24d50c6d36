"""Direct reads: O_DIRECT `preadv` on a thread pool, from the drive into the caller's slot.

No page cache, no copy: what is cached is decided by the tiers alone. A thread pool is enough to
keep one drive busy at megabyte sizes, since `preadv` releases the interpreter lock.
"""

import asyncio
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tierrun.io.reader import num_threads


class DirectReader:
    """Reads with O_DIRECT; see `Reader`."""

    name = "direct"

    def __init__(self, paths: Sequence[Path], depth: int) -> None:
        self._fds = [os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC) for path in paths]
        self._pool = ThreadPoolExecutor(
            num_threads(paths, depth), thread_name_prefix="tierrun-direct"
        )

    async def read(self, shard: int, offset: int, into: memoryview) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._pool, read_fully, self._fds[shard], offset, into)

    async def close(self) -> None:
        self._pool.shutdown()
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
