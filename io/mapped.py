"""Memory-mapped reads: the shards are mapped, a read copies out of the mapping.

The page cache does the caching. The store's sizes were checked when it was opened; a file truncated
under the mapping afterwards would be a SIGBUS, so the file's size is looked at before each copy.
"""

import asyncio
import errno
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tierrun.io.reader import num_threads


class MappedReader:
    """Copies from mappings; see `Reader`."""

    name = "mmap"

    def __init__(self, paths: Sequence[Path], depth: int) -> None:
        self._fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
        self._maps = [mmap.mmap(fd, 0, prot=mmap.PROT_READ) for fd in self._fds]
        self._views = [np.frombuffer(mapping, dtype=np.uint8) for mapping in self._maps]
        self._pool = ThreadPoolExecutor(
            num_threads(paths, depth), thread_name_prefix="tierrun-mmap"
        )

    async def read(self, shard: int, offset: int, into: memoryview) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._pool, self.fill, shard, offset, into)

    def fill(self, shard: int, offset: int, into: memoryview) -> None:
        """`read`, for who has no event loop; blocks, calls may overlap."""
        end = offset + len(into)
        if end > os.fstat(self._fds[shard]).st_size:
            raise OSError(errno.EIO, f"the file ends before byte {end}")
        # numpy's copy releases the interpreter lock, a memoryview's does not.
        np.copyto(np.frombuffer(into, dtype=np.uint8), self._views[shard][offset:end])

    async def close(self) -> None:
        self.release()

    def release(self) -> None:
        """`close`, for who has no event loop."""
        self._pool.shutdown()
        self._views.clear()
        for mapping in self._maps:
            mapping.close()
        for fd in self._fds:
            os.close(fd)
