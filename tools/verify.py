"""Every byte of a store against the checksums in its index."""

import mmap
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import local
from typing import NamedTuple

from xxhash import xxh3_64

from tierrun.io.errors import CorruptError
from tierrun.io.extent import Extent, format_bytes
from tierrun.io.store import ExpertKey, Store
from tierrun.tools.convert import Progress

THREADS = 4
"""Enough to keep a drive's queue filled; hashing one thread's data overlaps another's read."""

READ_BYTES = 8 << 20
SHOWN = 5
"""Problems told in full; of a broken drive there may be thousands."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found intact, and how long that took."""

    num_records: int
    nbytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        """`all intact: 6144 experts, 17.00 GiB in 11.2 s, 1.6 GB/s`"""
        return (
            f"all intact: {self.num_records} experts, {format_bytes(self.nbytes)} in "
            f"{self.seconds:.1f} s, {self.bytes_per_second / 1e9:.1f} GB/s"
        )


class _Check(NamedTuple):
    """Bytes that must have `checksum`; `what` they are, in words."""

    shard: int
    extent: Extent
    checksum: int
    what: str


def verify(store: Store, progress: Progress | None = None) -> VerifyReport:
    """Read and check the headers, the resident weights and the records of `store`.

    Raises:
        CorruptError: names the shard and the layer and expert (or tensor) of the first few
            mismatches, and says how many there are.
    """
    start = time.perf_counter()
    checks = sorted(_checks(store))
    total = sum(check.extent.nbytes for check in checks)
    problems, done = [], 0
    with _Reader(store) as reader, ThreadPoolExecutor(THREADS) as pool:
        for check, problem in zip(checks, pool.map(reader.problem, checks), strict=True):
            problems += [problem] if problem else []
            done += check.extent.nbytes
            if progress is not None:
                progress(done, total)
    if problems:
        raise CorruptError(_message(problems))
    return VerifyReport(store.manifest.num_experts, total, time.perf_counter() - start)


def _checks(store: Store) -> Iterator[_Check]:
    manifest = store.manifest
    for index, shard in enumerate(manifest.shards):
        yield _Check(index, Extent(0, shard.header_bytes), shard.checksum, "header")
    for resident in manifest.residents:
        what = f"tensor {resident.name}"
        yield _Check(resident.shard, resident.extent, resident.checksum, what)
    for number, layer in enumerate(manifest.layers):
        for expert, record in enumerate(layer.records):
            _, extent = store.locate(ExpertKey(number, expert))
            what = f"layer {number}, expert {expert}"
            yield _Check(record.shard, extent, record.checksum, what)


def _message(problems: list[str]) -> str:
    more = len(problems) - SHOWN
    text = "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
    return f"{text}; convert the model again"


class _Reader:
    """The shards of `store`, open, with a buffer for each thread that reads them."""

    def __init__(self, store: Store) -> None:
        self._paths = store.shard_paths
        self._files = [os.open(path, os.O_RDONLY) for path in self._paths]
        self._local = local()
        if sys.platform == "linux":  # check what the drive holds, not what is cached
            for descriptor in self._files:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files:
            os.close(descriptor)

    def problem(self, check: _Check) -> str | None:
        """What is wrong with the bytes of `check`, or None."""
        where = f"{self._paths[check.shard]}: {check.what}"
        try:
            checksum = self._checksum(self._files[check.shard], check.extent)
        except OSError as error:
            return f"{where} cannot be read ({error.strerror})"
        if checksum is None:
            return f"{where} ends early"
        if checksum != check.checksum:
            return f"{where} is corrupt (xxh3 {checksum:016x}, wanted {check.checksum:016x})"
        return None

    def _checksum(self, descriptor: int, extent: Extent) -> int | None:
        digest, offset = xxh3_64(), extent.offset
        while offset < extent.end:
            view = self._buffer()[: min(READ_BYTES, extent.end - offset)]
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                return None
            digest.update(view[:count])
            offset += count
        return digest.intdigest()

    def _buffer(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(mmap.mmap(-1, READ_BYTES))
        buffer: memoryview = self._local.buffer
        return buffer
