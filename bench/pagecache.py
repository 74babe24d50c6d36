"""The page cache: dropped for some files, and how much of them it holds."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def drop(paths: Sequence[Path]) -> None:
    """Have the cache forget what it holds of the files at `paths`, as far as nobody maps it."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_share(path: Path) -> float | None:
    """How much of the file at `path` the cache holds, 0 … 1; None where the system does not tell
    (a file that we may not write: others could watch its owner)."""
    size = path.stat().st_size
    if size == 0 or not os.access(path, os.W_OK):
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        view = np.frombuffer(mapping, dtype=np.uint8)
        address, vector = view.ctypes.data, pages.ctypes.data
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(vector)
        )
        del view  # a mapping with views cannot be closed
    return None if failed else float((pages & 1).mean())
