"""How an engine is set up."""

from dataclasses import dataclass

from tierrun.io.errors import UsageError
from tierrun.io.reads import DEFAULT_DEPTH


@dataclass(frozen=True, slots=True)
class Options:
    """The defaults of the command line's flags too.

    `context` 0 means the model's own maximum; `threads` 0 what torch chooses; `depth` is reads in
    flight per directory, in parts of records.

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
