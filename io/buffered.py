"""Buffered reads through the page cache, with aiofiles.

For filesystems without direct I/O, and for machines with memory to spare, where the page cache
serves what the tiers do not hold.
"""

import asyncio
import errno
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiofiles
from aiofiles.threadpool.binary import AsyncFileIO

from tierrun.io.reader import num_threads


class BufferedReader:
    """Reads with plain files; see `Reader`.

    A file has one position, so each shard keeps as many handles as reads overlapped on it.
    """

    name = "buffered"

    def __init__(self, paths: Sequence[Path], depth: int) -> None:
        self._paths = list(paths)
        self._idle: list[list[AsyncFileIO]] = [[] for _ in paths]
        self._pool = ThreadPoolExecutor(
            num_threads(paths, depth), thread_name_prefix="tierrun-buffered"
        )

    async def read(self, shard: int, offset: int, into: memoryview) -> None:
        file = await self._take(shard)
        try:
            await file.seek(offset)
            await self._fill(file, offset, into)
        finally:
            self._idle[shard].append(file)

    async def _take(self, shard: int) -> AsyncFileIO:
        if self._idle[shard]:
            return self._idle[shard].pop()
        return await aiofiles.open(
            self._paths[shard],
            "rb",
            buffering=0,
            loop=asyncio.get_running_loop(),
            executor=self._pool,
        )

    async def _fill(self, file: AsyncFileIO, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            count = await file.readinto(into[done:])
            if not count:
                raise OSError(errno.EIO, f"the file ends at byte {offset + done}")
            done += count

    async def close(self) -> None:
        for handles in self._idle:
            for file in handles:
                await file.close()
        self._pool.shutdown()
