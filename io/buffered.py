"""Buffered reads through the page cache, with aiofiles on an event loop of their own.

For filesystems without direct I/O, and for machines with memory to spare, where the page cache
serves what the tiers do not hold.
"""

import asyncio
import errno
import threading
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
        self._loop = _new_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="tierrun-buffered-loop", daemon=True
        )
        self._thread.start()

    def read(self, shard: int, offset: int, into: memoryview) -> None:
        """See `Reader`."""
        asyncio.run_coroutine_threadsafe(self._read(shard, offset, into), self._loop).result()

    async def _read(self, shard: int, offset: int, into: memoryview) -> None:
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

    def close(self) -> None:
        """See `Reader`."""
        asyncio.run_coroutine_threadsafe(self._close_files(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._pool.shutdown()

    async def _close_files(self) -> None:
        for handles in self._idle:
            for file in handles:
                await file.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # no uvloop on this platform; asyncio's own loop does the same, slower
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
