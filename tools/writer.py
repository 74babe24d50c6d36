"""Writing shards: pieces at known offsets, synced in batches, journaled once they are safe."""

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from xxhash import xxh3_64

from tierrun.tools.disk import disk_errors, shard_paths
from tierrun.tools.journal import Journal
from tierrun.tools.layout import Layout

BATCH_BYTES = 256 << 20
BATCH_SECONDS = 2.0
"""After so much or so long a batch is synced; this much at most is written again after a kill."""


class ShardWriter:
    """Writes items into the shards of `layout`, one step behind the caller.

    Guarantees: an item is journaled only when all its bytes are on the disk; at most one piece is
    being written while the caller prepares the next. `checksums` are those of journaled items.
    Assumes: one caller; the pieces of an item come in order and are finished before the next item.
    """

    def __init__(self, layout: Layout, directories: Sequence[Path], journal: Journal) -> None:
        self._layout, self._directories = layout, directories
        self._paths = shard_paths(layout, directories)
        self._journal = journal
        self._files: dict[int, int] = {}
        self._prepared: set[int] = set()
        self._hash = xxh3_64()
        self._batch: dict[int, int] = {}
        self.checksums: dict[int, int] = {}
        self._batch_bytes, self._batch_start = 0, time.monotonic()
        self._thread = ThreadPoolExecutor(1, "tierrun-write")
        self._pending: Future[None] | None = None

    def write(self, shard: int, offset: int, piece: torch.Tensor) -> None:
        """Queue `piece` (contiguous) for `offset` of `shard`.

        Raises:
            DiskFullError, UsageError: what the write before met.
        """
        self._submit(lambda: self._write(shard, offset, piece))

    def finish(self, item: int) -> None:
        """All pieces of `item` have been queued."""
        self._submit(lambda: self._finish(item))

    def flush(self) -> None:
        """Wait until everything is on the disk and journaled."""
        self._submit(self._sync)
        self._wait()

    def close(self) -> None:
        """Stop, keeping what is finished; the rest is written again by the next run."""
        self._thread.shutdown()
        with suppress(OSError):  # a full disk, most likely, and told already
            self._sync()
        self._close_files()

    def _submit(self, work: Callable[[], None]) -> None:
        self._wait()
        self._pending = self._thread.submit(self._guarded, work)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _guarded(self, work: Callable[[], None]) -> None:
        with disk_errors(self._layout, self._directories):
            work()

    def _write(self, shard: int, offset: int, piece: torch.Tensor) -> None:
        data = piece.view(-1).view(torch.uint8).numpy().data
        self._hash.update(data)
        self._batch_bytes += len(data)
        _write_all(self._file(shard), data, offset)

    def _finish(self, item: int) -> None:
        self._batch[item] = self._hash.intdigest()
        self._hash.reset()
        age = time.monotonic() - self._batch_start
        if self._batch_bytes >= BATCH_BYTES or age >= BATCH_SECONDS:
            self._sync()

    def _sync(self) -> None:
        for descriptor in self._files.values():
            os.fdatasync(descriptor)
            if sys.platform == "linux":  # a store is read directly, or on another day
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._close_files()
        self._journal.commit(self._batch)
        self.checksums |= self._batch
        self._batch = {}
        self._batch_bytes, self._batch_start = 0, time.monotonic()

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            self._files[shard] = os.open(self._paths[shard], flags, 0o644)
            self._prepare(shard)
        return self._files[shard]

    def _prepare(self, shard: int) -> None:
        """Give the file its size and header; repeated by every run that writes to it."""
        if shard in self._prepared:
            return
        nbytes = self._layout.manifest.shards[shard].nbytes
        try:
            os.posix_fallocate(self._files[shard], 0, nbytes)
        except OSError as error:  # where unsupported, a full disk shows later, at a write
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        os.ftruncate(self._files[shard], nbytes)
        _write_all(self._files[shard], memoryview(self._layout.headers[shard]), 0)
        self._prepared.add(shard)

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
