"""How an engine is set up."""

import os
from dataclasses import dataclass

from tierrun.io.errors import UsageError
from tierrun.io.reads import DEFAULT_DEPTH


@dataclass(frozen=True, slots=True)
class Options:
    """The defaults of the command line's flags too.

    `context` 0 means the model's own maximum; `threads` 0 all cores but one, which is left to the
    reads; `depth` is reads in flight per directory, in parts of records.

    Raises:
        UsageError: a value out of range.
    """

    device: str = "cpu"
    vram: str = "auto"
    ram: str = "auto"
    io: str = "auto"
    policy: str = "lfru"
    lookahead: bool = True
    context: int = 0
    ubatch: int = 512
    threads: int = 0
    depth: int = DEFAULT_DEPTH
    strict: bool = False

    @property
    def num_threads(self) -> int:
        """Threads that compute. With a thread on every core, whatever else runs (a read, another
        process) makes all of them wait at every barrier: 0.6 ms an expert became up to 40."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) - 1)

    def __post_init__(self) -> None:
        if self.device != "cpu":
            raise UsageError(f"--device {self.device}: only cpu is supported in this version")
        for name, value, least in (
            ("-c/--ctx-size", self.context, 0),
            ("-ub/--ubatch-size", self.ubatch, 1),
            ("-t/--threads", self.threads, 0),
            ("--depth", self.depth, 1),
        ):
            if value < least:
                raise UsageError(f"{name} {value}: must be at least {least}")
