"""How fast a drive gives experts: from a store's records, or from a test file.

Reading m experts of a layer takes a start (`latency`) and their bytes at `bandwidth`: a line
through what one of them and what several take at once, in parts, as the read queue asks for them.
"""

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tierrun.bench.demand import OUTSTANDING, Arm, Demander, open_queue
from tierrun.io.errors import UsageError
from tierrun.io.extent import PAGE, align_up, format_bytes
from tierrun.io.reader import choose_reader
from tierrun.io.reads import DEFAULT_DEPTH, PART_BYTES
from tierrun.io.store import Store
from tierrun.tiers.memory import OrdinaryMemory
from tierrun.tiers.slab import host_bytes

_FILE_BYTES = 256 << 20
_SECONDS = 0.4
_SEVERAL = OUTSTANDING


class Drive(NamedTuple):
    """Bytes per second of whole records, seconds until they begin to come, and whence."""

    bandwidth: float
    latency: float
    source: str


class Sample(NamedTuple):
    """Bytes asked for at once, and the seconds that they took."""

    nbytes: float
    seconds: float


UNKNOWN = Drive(3e9, 100e-6, "assumed: PCIe 3; --nvme-dir DIR measures the drive of DIR")


def of_store(store: Store) -> Drive:
    """What the drives of `store` give together, by the engine's reads; a second for each of them,
    nothing is written."""
    choice = choose_reader("auto", store.shard_paths)
    try:
        with open_queue(store, choice.name, DEFAULT_DEPTH, PART_BYTES) as queue:
            found = [
                _line(_demand(Demander(store, queue, shard), holds))
                for shard, holds in _fullest_shards(store)
            ]
    except OSError as error:
        return UNKNOWN._replace(source=f"assumed: it could not be measured ({error.strerror})")
    source = "measured on the store's records"
    if choice.fallback:
        source += f", through the page cache ({choice.reason})"
    return _together(found, source)


def _fullest_shards(store: Store) -> list[tuple[int, int]]:
    """Of every directory the shard with the most records, and how many those are."""
    held = Counter(record.shard for layer in store.manifest.layers for record in layer.records)
    best: dict[Path, int] = {}
    for shard, count in held.items():
        directory = store.shard_paths[shard].parent
        if count > held.get(best.get(directory, -1), 0):
            best[directory] = shard
    return [(shard, held[shard]) for shard in best.values()]


def _demand(demander: Demander, holds: int) -> Callable[[int], Sample]:
    def sample(count: int) -> Sample:
        reading = demander.run(Arm(min(count, holds)), _SECONDS)
        return Sample(reading.bandwidth * reading.batch_seconds, reading.batch_seconds)

    return sample


def of_directories(directories: Sequence[Path], record_bytes: int) -> Drive:
    """What the drives below `directories` give together.

    A file of 256 MiB is written to each; it has no name, and is gone however this ends.

    Raises:
        UsageError: a directory that is not there, cannot be written, or has no room or direct I/O.
    """
    found = [_measured(directory, record_bytes) for directory in directories]
    return _together(found, "measured on a test file")


def _measured(directory: Path, record_bytes: int) -> tuple[float, float]:
    if not directory.is_dir():
        raise UsageError(f"--nvme-dir {directory}: no such directory")
    nbytes = min(align_up(record_bytes, PAGE), _FILE_BYTES // _SEVERAL)
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=".tierrun-plan-") as file:
            block = os.urandom(16 << 20)
            for _ in range(_FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _read(f"/proc/self/fd/{file.fileno()}", nbytes)
    except OSError as error:
        raise UsageError(
            f"--nvme-dir {directory}: a test file of {format_bytes(_FILE_BYTES)} cannot be "
            f"written and read directly ({error.strerror}); or give the drive's speed: "
            "--assume drive=3GB/s"
        ) from None


def _read(path: str, nbytes: int) -> tuple[float, float]:
    """The line of direct reads of `nbytes` at random places."""
    choice, places = random.Random(0), (_FILE_BYTES - nbytes) // PAGE
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def part(into: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [into], offset)

    def batch(pool: ThreadPoolExecutor, into: memoryview) -> int:
        tasks = []
        for begin in range(0, len(into), nbytes):
            place = PAGE * choice.randint(0, places)
            for offset in range(0, nbytes, PART_BYTES):
                end = begin + min(offset + PART_BYTES, nbytes)
                tasks.append(pool.submit(part, into[begin + offset : end], place + offset))
        return sum(task.result() for task in tasks)

    def sample(count: int) -> Sample:
        into = host_bytes(OrdinaryMemory().allocate(count * nbytes))
        total, times, started = 0, 0, time.perf_counter()
        with ThreadPoolExecutor(DEFAULT_DEPTH) as pool:
            while not times or time.perf_counter() < started + _SECONDS:
                total, times = total + batch(pool, into), times + 1
            seconds = time.perf_counter() - started
        return Sample(total / times, seconds / times)

    try:
        return _line(sample)
    finally:
        os.close(descriptor)


def _line(sample: Callable[[int], Sample]) -> tuple[float, float]:
    """Bytes per second and seconds before them, through one record and several at once."""
    one, several = sample(1), sample(_SEVERAL)
    more, longer = several.nbytes - one.nbytes, several.seconds - one.seconds
    if more <= 0 or longer <= 0:
        return several.nbytes / several.seconds, 0.0
    return more / longer, max(0.0, one.seconds - one.nbytes * longer / more)


def _together(found: Sequence[tuple[float, float]], source: str) -> Drive:
    """Drives that are read side by side."""
    bandwidths, latencies = zip(*found, strict=True)
    return Drive(sum(bandwidths), max(latencies), source)
