"""Memory-mapped reads: the shards are mapped, a read copies out of the mapping.

The page cache does the caching. The store's sizes were checked when it was opened; a file truncated
under the mapping afterwards would be a SIGBUS, so the file's size is looked at before each copy.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class MappedReader:
    """Copies from mappings; see `Reader`."""

    name = "mmap"

    def __init__(self, paths: Sequence[Path]) -> None:
        self._fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
        self._maps = [mmap.mmap(fd, 0, prot=mmap.PROT_READ) for fd in self._fds]
        self._views = [np.frombuffer(mapping, dtype=np.uint8) for mapping in self._maps]

    def read(self, shard: int, offset: int, into: memoryview) -> None:
        """See `Reader`."""
        end = offset + len(into)
        if end > os.fstat(self._fds[shard]).st_size:
            raise OSError(errno.EIO, f"the file ends before byte {end}")
        # numpy's copy releases the interpreter lock, a memoryview's does not.
        np.copyto(np.frombuffer(into, dtype=np.uint8), self._views[shard][offset:end])

    def close(self) -> None:
        """See `Reader`."""
        self._views.clear()
        for mapping in self._maps:
            mapping.close()
        for fd in self._fds:
            os.close(fd)
