"""What one run of an arm of `tierrun bench peers` found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tierrun.bench.decode import DecodeRun


class Measured(NamedTuple):
    """A test of one run: its speed, the run's peak of memory, and how long all of it took."""

    tokens_per_second: float
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ran:
    """One run: by llama-bench's name of each test what was measured. `decode` is ours; `about` is
    what the program says of itself."""

    tests: dict[str, Measured]
    peak_bytes: int
    decode: DecodeRun | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
