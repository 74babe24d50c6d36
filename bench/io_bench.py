"""`tierrun bench io`: what drives give to reads of whole records, by size, depth and reader.

All cells are measured once per round, in one order, round after round: what slows the machine down
for a while spreads over the cells instead of striking one.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierrun.bench.cells import Cell, Metric, Results
from tierrun.bench.io_load import Load, Read, run_load
from tierrun.bench.io_plan import OVERHEAD_SECONDS, USUAL_BANDWIDTH, Case
from tierrun.bench.io_readers import COLD, HostBuffers, open_to_device, open_to_host, touch
from tierrun.bench.io_sources import Source, stored_sources
from tierrun.bench.io_testfile import Progress, nameless_file
from tierrun.bench.pagecache import cached_share, drop
from tierrun.bench.sheets import in_words
from tierrun.bench.steps import Steps
from tierrun.io.drives import drives_of
from tierrun.io.errors import TierrunError, UsageError
from tierrun.io.extent import format_bytes
from tierrun.io.measuring import Place
from tierrun.io.reader import memory_filesystem

if TYPE_CHECKING:
    import torch

METRICS = (
    Metric("bandwidth", "GB/s", 1e-9, 2, True),
    Metric("iops", "IOPS", 1, 0, True),
    Metric("p50", "p50 ms", 1e3, 2, False),
    Metric("p95", "p95 ms", 1e3, 2, False),
    Metric("p99", "p99 ms", 1e3, 2, False),
)

_WARM_BYTES = 512 << 20
"""What `mmap-warm` reads of: enough to be more than the processor's caches."""

_SMALL_BYTES = 2 << 30
"""Below it a file is no fair test of a drive."""

_STILL_CACHED = 0.01
_BUSY = 0.5
"""Runnable processes per core from which on numbers are not the drive's alone."""

_FILLS = 2
"""A round fills and empties the queue, beside the time that counts."""


@contextmanager
def open_sources(
    directories: Sequence[Path], asked: int | None, progress: Progress
) -> Iterator[list[Source]]:
    """What to read in each of `directories`: the store there, or a test file while it lasts.

    Raises:
        TierrunError: one of them cannot be used; says why.
    """
    if len(set(directories)) < len(directories):
        raise UsageError("name every --nvme-dir once")
    stored = stored_sources(directories)
    with ExitStack() as stack:
        sources = []
        for directory in directories:
            source = stored.get(directory)
            if source is None:
                path = stack.enter_context(nameless_file(directory, asked, progress))
                source = Source(directory, (path,), "a test file")
            sources.append(source)
        yield sources


class Bench:
    """Measures cases, with buffers that serve one after the other."""

    def __init__(self, cases: Sequence[Case], device: "torch.device | None") -> None:
        to_host = (case for case in cases if case.to == "host")
        needed = (HostBuffers.needed(case.nbytes, case.lanes) for case in to_host)
        self._buffers = HostBuffers(max(needed, default=0))
        self._device = device

    def measure(self, case: Case, seconds: float, seed: int) -> Load:
        """One round of `case`.

        Raises:
            TierrunError: the drive failed, or is gone.
        """
        paths = [path for source in case.sources for path in source.paths]
        try:
            if case.reader != "mmap-warm":
                drop(paths)
            with self._opened(case, paths) as read:
                return run_load(read, self._streams(case, read, seed), case.nbytes, seconds)
        except OSError as error:
            where = " or ".join(str(source.directory) for source in case.sources)
            raise TierrunError(
                f"{where}: a read of {case.nbytes} bytes by {case.reader} failed "
                f"({error.strerror or error}): is the drive still there?"
            ) from error

    @contextmanager
    def _opened(self, case: Case, paths: Sequence[Path]) -> Iterator[Read]:
        if case.to == "host":
            buffers = self._buffers.lanes(case.nbytes, case.lanes)
            with open_to_host(case.reader, paths, buffers) as read:
                yield read
        else:
            assert self._device is not None
            with open_to_device(case.reader, paths, case.nbytes, case.lanes, self._device) as read:
                yield read

    def _streams(self, case: Case, read: Read, seed: int) -> list[Iterator[Place]]:
        """For each lane the places to read, shared by the lanes of a directory."""
        shared, before = [], 0
        for source in case.sources:
            places = self._places(case, source, before, seed)
            before += len(source.paths)
            if case.reader == "mmap-warm":
                touch(read, places)
            shared.append(iter(places) if case.reader in COLD else itertools.cycle(places))
        return [stream for _ in range(case.depth) for stream in shared]

    def _places(self, case: Case, source: Source, before: int, seed: int) -> list[Place]:
        """Of `source`, whose files are behind `before` others."""
        shuffled = case.pattern == "random"
        if case.reader == "mmap-warm":
            most = max(1, _WARM_BYTES // case.nbytes)
            places = source.first_places(case.nbytes, shuffled=shuffled, most=most)
        else:
            places = source.places(case.nbytes, shuffled=shuffled, seed=seed)
        return [Place(place.shard + before, place.offset) for place in places]


def measure_all(
    bench: Bench,
    cases: Sequence[Case],
    rounds: int,
    seconds: float,
    steps: Steps,
    found: dict[int, list[Load]],
) -> None:
    """All `cases`, `rounds` times, for `seconds` each, into `found` by their numbers.

    Raises:
        TierrunError: a drive failed.
    """
    steps.expect(rounds * sum(expected_seconds(case, seconds) for case in cases))
    for number in range(rounds):
        for place, case in enumerate(cases):
            which = f"round {number + 1} of {rounds}, {place + 1} of {len(cases)}"
            steps.begin(f"{which}: {in_words(case.key())}")
            load = bench.measure(case, seconds, number)
            found.setdefault(place, []).append(load)
            said = f"{which}: {in_words(case.key())}: {load.bandwidth / 1e9:.2f} GB/s"
            steps.end(said, expected_seconds(case, seconds))


def expected_seconds(case: Case, seconds: float) -> float:
    """What a round of `case` takes, about: warming up, `seconds`, and what is in flight then."""
    return OVERHEAD_SECONDS + seconds + _FILLS * case.in_flight / USUAL_BANDWIDTH


def cells_of(cases: Sequence[Case], found: Mapping[int, Sequence[Load]]) -> list[Cell]:
    """Those that were measured."""
    return [_cell(cases[number], loads) for number, loads in sorted(found.items())]


def ended_early(found: Mapping[int, Sequence[Load]], num_cases: int, rounds: int) -> str:
    """What there is of a run that was told to end, in a sentence."""
    done, missing = sum(map(len, found.values())), num_cases - len(found)
    said = f"told to end after {done} of {num_cases * rounds} measurements"
    return f"{said}: {missing} of {num_cases} cells are missing" if missing else said


def _cell(case: Case, loads: Sequence[Load]) -> Cell:
    samples = {name: tuple(getattr(load, name) for load in loads) for name in Load._fields}
    return Cell(case.key(), samples)


def results_of(
    cells: Sequence[Cell],
    sources: Sequence[Source],
    setting: dict[str, Any],
    notes: Sequence[str],
    details: dict[str, Any],
) -> Results:
    """The document's results: what was read is part of the setting."""
    where = {
        "drives": [drive.identity for drive in drives_of(s.directory for s in sources)],
        "files": [f"{s.what}, {format_bytes(s.nbytes)}" for s in sources],
    }
    return Results("io", METRICS, tuple(cells), where | setting, tuple(notes), details)


def about(sources: Sequence[Source], cases: Sequence[Case]) -> Iterator[str]:
    """What has to be known to read the numbers, a sentence each."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > _BUSY * cores:
        yield f"others were busy when it began (load average {load:.1f}, {cores} cores)"
    for source in sources:
        yield from _about_source(source)
    readers = {case.reader for case in cases}
    past = [name for name in ("direct", "kvikio-compat", "kvikio-gds") if name in readers]
    if past:
        yield f"{', '.join(past)}: past the page cache (O_DIRECT)"
    cold = [name for name in COLD if name in readers]
    if cold and not all(memory_filesystem(source.directory) for source in sources):
        yield (
            f"{', '.join(cold)}: the page cache's copy of the files dropped before every cell and "
            "round (posix_fadvise), no place read twice; what the kernel reads ahead stays"
        )
    if "mmap-warm" in readers:
        yield "mmap-warm: from the page cache; it measures memory, not the drive"
    yield (
        "GB is 10⁹ bytes, MB 10⁶; depth: reads in flight per directory; latency from submission to "
        "completion of one read, as fio's lat"
    )


def _about_source(source: Source) -> Iterator[str]:
    yield f"{source.directory}: {source.what}, {format_bytes(source.nbytes)}"
    memory = memory_filesystem(source.directory)
    if memory is not None:
        yield f"{source.directory} is a {memory}: this measures memory, not a drive"
    elif source.nbytes < _SMALL_BYTES:
        yield (
            f"{source.directory}: so small that the drive's own cache, and what the kernel reads "
            "ahead, may serve much of it"
        )
    drop(source.paths)
    shares = [share for path in source.paths if (share := cached_share(path)) is not None]
    if memory is None and max(shares, default=0.0) > _STILL_CACHED:
        yield (
            f"{source.directory}: {max(shares):.0%} of a file stays in the page cache, since "
            "somebody maps it: cold readers measure that as well"
        )
