"""Experts from the store straight into VRAM, past the warm tier: those not expected back.

Reads go by parts, as the read queue's do, on a pool of threads. The counterpart of `ReadQueue` for
records that never lie in host memory: the same retries, checksums and errors.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import torch
import xxhash

from tierrun.io.errors import CorruptError, ReadError
from tierrun.io.reads import PART_BYTES
from tierrun.io.store import ExpertKey, Record, Store
from tierrun.tiers.slab import host_bytes
from tierrun.tiers.staging import BounceBuffers, DeviceReader


class StraightReads:
    """Reads records of `store` into device memory with `reader`, `threads` parts at once.

    Guarantees:
    - the future of `submit` ends, with None or with a named error; once it has ended nothing
      writes to its memory any more, and whatever is launched next on any stream sees the bytes;
    - a failed read is tried once more; a record is compared with its checksum at its first read
      here, for which it is copied back once, and read once more if it differs.
    Assumes: as `DeviceReader`, until the future has ended; `submit` is called by one thread.
    """

    def __init__(
        self,
        store: Store,
        reader: DeviceReader,
        buffers: BounceBuffers,
        threads: int,
        closing: Callable[[], None],
    ) -> None:
        self._store, self._reader, self._buffers = store, reader, buffers
        self._closing = closing
        self._verified: set[ExpertKey] = set()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tierrun-straight")

    @property
    def reader_name(self) -> str:
        return self._reader.name

    def submit(self, key: ExpertKey, into: torch.Tensor) -> Future[None]:
        """Begin to read the record of `key` into `into`, uint8 of its size on the device.

        The future raises:
            ReadError: the read failed twice.
            CorruptError: the record differs from its checksum, twice.
        """
        record, extent = self._store.locate(key)
        assert into.nbytes == extent.nbytes
        job = _Job(-(-extent.nbytes // PART_BYTES))
        for start in range(0, extent.nbytes, PART_BYTES):
            self._pool.submit(self._part, job, key, record, start, into)
        return job.future

    def close(self) -> None:
        """Wait for what is under way, let go of files and memory."""
        self._pool.shutdown()
        self._closing()
        self._buffers.release()

    def _part(
        self, job: "_Job", key: ExpertKey, record: Record, start: int, into: torch.Tensor
    ) -> None:
        """Read one part; the last one to end checks the record and ends the job."""
        try:
            if job.error is None:
                self._read_twice(key, record, start, into[start : start + PART_BYTES])
        except Exception as error:
            job.error = error
        if not job.is_last():
            return
        try:
            if job.error is None:
                self._verify(key, record, into)
        except Exception as error:
            job.error = error
        job.end()

    def _read_twice(self, key: ExpertKey, record: Record, start: int, into: torch.Tensor) -> None:
        try:
            self._reader.read_device(record.shard, record.offset + start, into)
        except OSError:
            try:
                self._reader.read_device(record.shard, record.offset + start, into)
            except OSError as error:
                path = str(self._store.shard_paths[record.shard])
                reason = error.strerror or str(error)
                raise ReadError(path, *key, error.errno or 0, reason) from error

    def _verify(self, key: ExpertKey, record: Record, into: torch.Tensor) -> None:
        if key in self._verified:
            return
        if self._digest(into) != record.checksum:
            self._read_twice(key, record, 0, into)
            if self._digest(into) != record.checksum:
                raise CorruptError(
                    f"{self._store.shard_paths[record.shard]}: layer {key.layer}, expert "
                    f"{key.expert} differs from its checksum (read twice); convert the model again"
                )
        self._verified.add(key)

    def _digest(self, data: torch.Tensor) -> int:
        """xxh3-64 of device memory."""
        hasher = xxhash.xxh3_64()
        with self._buffers.borrow() as buffer:
            for start in range(0, data.nbytes, PART_BYTES):
                part = data[start : start + PART_BYTES]
                copy = buffer.data[: part.nbytes]
                buffer.copy(copy, part)
                hasher.update(host_bytes(copy))
        return hasher.intdigest()


class _Job:
    """A record being read: how many of its parts have not ended, and what went wrong first."""

    def __init__(self, parts: int) -> None:
        self.future: Future[None] = Future()
        self.error: Exception | None = None
        self._left = parts
        self._lock = Lock()

    def is_last(self) -> bool:
        """Note the end of a part; whether it was the last one."""
        with self._lock:
            self._left -= 1
            return self._left == 0

    def end(self) -> None:
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(None)
