"""What `tierrun bench io` measures: which sizes, depths, readers and patterns, and for how long.

Without a word about any of them it is a subset that ends in about two minutes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tierrun.bench.cells import Value
from tierrun.bench.io_readers import DEVICE_READERS, READERS, HostBuffers, obstacle
from tierrun.bench.io_sizes import ALL, USUAL
from tierrun.bench.io_sources import Source
from tierrun.bench.words import checked_duration, each, fair_seconds, known, left_out_notes
from tierrun.io.errors import UsageError
from tierrun.io.extent import PAGE, align_up, format_bytes, parse_bytes

PATTERNS = ("random", "sequential")
ALL_DEPTHS = (1, 2, 4, 8, 16, 32, 64)
USUAL_DEPTHS = (1, 4, 16)
MOST_DEPTH = 1024

_USUAL_IN_FLIGHT = 512 << 20
"""More at once tells nothing new, but takes seconds on a slow drive: only when asked for."""

_BUDGET_SECONDS = 110.0
OVERHEAD_SECONDS = 0.2
"""Of a round of a cell, on average: warming up, and dropping what is cached."""

USUAL_BANDWIDTH = 2e9
"""Of a drive, where something has to be assumed before it is measured."""

_SHORTEST, _LONGEST = 0.15, 1.0

LEAST_PLACES = 3
"""For each lane: one read to warm up, two that count."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for. None: the usual."""

    sizes: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    readers: tuple[str, ...] | None = None
    patterns: tuple[str, ...] | None = None
    full: bool = False
    rounds: int = 5
    seconds: float | None = None

    @staticmethod
    def of(
        sizes: str | None,
        depths: str | None,
        readers: str | None,
        pattern: str | None,
        full: bool,
        rounds: int,
        seconds: float | None,
    ) -> "Plan":
        """From the words of a command line.

        Raises:
            UsageError: one that is not understood.
        """
        return Plan(
            each(sizes, _size),
            each(depths, _depth),
            each(readers, lambda name: known("--readers", name, READERS)),
            _patterns(pattern),
            full,
            rounds,
            checked_duration(seconds),
        )

    def sizes_of(self, sources: Sequence[Source]) -> tuple[int, ...]:
        """What was asked for; else those of the stores' own records, and those of real models."""
        if self.sizes is not None:
            return self.sizes
        own = {nbytes for source in sources for nbytes in source.records}
        return tuple(sorted(own | set(ALL if self.full else USUAL)))

    def seconds_of(self, num_cases: int) -> float:
        """Of each round of each case."""
        if self.seconds is not None:
            return self.seconds
        if self.full:
            return _LONGEST
        goes = num_cases * self.rounds
        budget = _BUDGET_SECONDS - goes * OVERHEAD_SECONDS
        return fair_seconds(goes, budget, _SHORTEST, _LONGEST)


class Case(NamedTuple):
    """One cell: what is read from where, how and into what. `depth` is that of each directory."""

    sources: tuple[Source, ...]
    reader: str
    to: str
    pattern: str
    nbytes: int
    depth: int

    @property
    def lanes(self) -> int:
        return self.depth * len(self.sources)

    @property
    def in_flight(self) -> int:
        """Bytes asked for at once."""
        return self.lanes * self.nbytes

    def key(self) -> dict[str, Value]:
        """As a cell of the results."""
        return {
            "directory": " + ".join(str(source.directory) for source in self.sources),
            "reader": self.reader,
            "to": self.to,
            "pattern": self.pattern,
            "bytes": self.nbytes,
            "depth": self.depth,
        }


@dataclass(slots=True)
class Cases:
    """The cases that can be measured, and why others cannot."""

    chosen: list[Case] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def notes(self) -> Iterator[str]:
        """What was left out, a sentence for each reason."""
        return left_out_notes(self.left_out)


def choose_cases(
    plan: Plan, sources: Sequence[Source], targets: Sequence[str], memory: int
) -> Cases:
    """Every case of `plan` on each of `sources`, and on all of them together; those that need
    more than `memory` bytes of buffers, for example, are left out, and it is said.

    Raises:
        UsageError: none is left; says why.
    """
    cases, hindrances = Cases(), _Hindrances()
    for case in _every_case(plan, sources, targets):
        reason = hindrances.of(case) or _reason_against(case, plan, memory)
        if reason is None:
            cases.chosen.append(case)
        else:
            cases.left_out[reason] += 1
    if not cases.chosen:
        raise UsageError(f"nothing can be measured: {'; '.join(cases.left_out) or 'no readers'}")
    return cases


class _Hindrances:
    """Why readers cannot be used on sources, each found out once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, Path], str | None] = {}

    def of(self, case: Case) -> str | None:
        """Why `case` cannot be measured, or None."""
        for source in case.sources:
            key = (case.reader, source.directory)
            if key not in self._found:
                self._found[key] = obstacle(case.reader, source.paths[0])
            if self._found[key] is not None:
                return f"{case.reader} in {source.directory}: {self._found[key]}"
        return None


def _every_case(plan: Plan, sources: Sequence[Source], targets: Sequence[str]) -> Iterator[Case]:
    groups: list[tuple[Source, ...]] = [(source,) for source in sources]
    if len(sources) > 1:
        groups.append(tuple(sources))
    sizes, depths = plan.sizes_of(sources), plan.depths or _depths(plan.full)
    patterns = plan.patterns or (PATTERNS if plan.full else PATTERNS[:1])
    for group in groups:
        for reader, to in _ways(plan, targets):
            for pattern in patterns:
                for nbytes in sizes:
                    for depth in depths:
                        yield Case(group, reader, to, pattern, nbytes, depth)


def _ways(plan: Plan, targets: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Readers, and where they read to; kvikio where it is installed or asked for."""
    has_kvikio = find_spec("kvikio") is not None
    usual = [reader for reader in READERS if has_kvikio or not reader.startswith("kvikio")]
    for reader in plan.readers or usual:
        yield from ((reader, to) for to in targets if to == "host" or reader in DEVICE_READERS)


def _depths(full: bool) -> tuple[int, ...]:
    return ALL_DEPTHS if full else USUAL_DEPTHS


def _reason_against(case: Case, plan: Plan, memory: int) -> str | None:
    """What there is too little of for `case`, or None."""
    if any(s.num_places(case.nbytes) < LEAST_PLACES * case.depth for s in case.sources):
        return f"fewer than {LEAST_PLACES} records for each read in flight: the files are too small"
    if HostBuffers.needed(case.nbytes, case.lanes) > memory:
        return f"more than {format_bytes(memory)}, a quarter of the free memory, in flight at once"
    usual = not plan.full and (plan.sizes is None or plan.depths is None)
    if usual and case.in_flight > _USUAL_IN_FLIGHT:
        return f"more than {format_bytes(_USUAL_IN_FLIGHT)} in flight at once (--full has them)"
    return None


def _size(text: str) -> int:
    nbytes = align_up(parse_bytes(text))
    if nbytes < PAGE:
        raise UsageError(f"--sizes {text}: a record has at least one byte")
    return nbytes


def _depth(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_DEPTH:
        raise UsageError(f"--depths {text!r}: write numbers from 1 to {MOST_DEPTH}, like 1,4,16")
    return int(text)


def _patterns(text: str | None) -> tuple[str, ...] | None:
    if text == "both":
        return PATTERNS
    return each(text, lambda name: known("--pattern", name, (*PATTERNS, "both")))
