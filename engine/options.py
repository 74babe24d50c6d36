"""How an engine is set up."""

import os
from dataclasses import dataclass

from tierrun.engine.cores import physical_cores
from tierrun.io.errors import UsageError
from tierrun.io.reads import DEFAULT_DEPTH
from tierrun.tiers.lanes import LANES

COMPILE = ("auto", "on", "off")
"""`auto` compiles where an earlier `on` has left its results on disk."""

_HOST_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Options:
    """The defaults of the command line's flags too.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`. `context` 0 means the model's own maximum (on a
    GPU at most 8192); `ubatch` is how many tokens of a prompt are computed at once, where 0 means
    512 on the CPU, and on a GPU what its bandwidths and memory make best. `lanes` says who computes
    experts in RAM beside a GPU: the CPU where they lie, the GPU over its bus, or (`auto`) both by
    cost; `threads` 0 means all cores for the CPU's own kernels, and all but one, which is left to
    the reads, for torch and beside a GPU; `depth` is reads in flight per
    directory, in parts of records. `exact` on the CPU keeps activations in fp32; on a GPU it fixes
    every kernel, prompts' chunks too (`ubatch` 0 is 2048 then, or the context), and computes
    nothing on the CPU beside it, so that logits are the same bits whatever the budgets; `compile`
    and `graphs` concern the GPU's decode.

    Raises:
        UsageError: a value out of range.
    """

    device: str = "auto"
    vram: str = "auto"
    ram: str = "auto"
    io: str = "auto"
    policy: str = "rates"
    lookahead: bool = True
    context: int = 0
    ubatch: int = 0
    threads: int = 0
    depth: int = DEFAULT_DEPTH
    strict: bool = False
    exact: bool = False
    lanes: str = "auto"
    compile: str = "auto"
    graphs: bool = True

    @property
    def host_chunk(self) -> int:
        """Tokens of a prompt that the CPU computes at once."""
        return self.ubatch or _HOST_CHUNK

    @property
    def kernel_threads(self) -> int:
        """Threads of the CPU's own kernels, where nothing is computed by a GPU. Whoever has a core
        takes the next task: one that something else runs on costs its part, no more."""
        return self.threads or physical_cores()

    @property
    def num_threads(self) -> int:
        """Threads that torch computes with, and beside a GPU the kernels, too.

        With a thread on every core, whatever else runs (a read, another process) makes all of them
        wait at every barrier of torch's: 0.6 ms an expert became up to 40.
        """
        return self.threads or max(1, len(os.sched_getaffinity(0)) - 1)

    def __post_init__(self) -> None:
        if self.compile not in COMPILE:
            raise UsageError(f"--compile {self.compile}: choose {', '.join(COMPILE)}")
        if self.lanes not in LANES:
            raise UsageError(f"--lanes {self.lanes}: choose {', '.join(LANES)}")
        if self.exact and self.lanes == "cpu":
            raise UsageError("--exact and --lanes cpu exclude each other: the CPU's bits differ")
        if self.exact and self.compile == "on":
            raise UsageError("--exact and --compile on exclude each other: compiling changes bits")
        for name, value, least in (
            ("-c/--ctx-size", self.context, 0),
            ("-ub/--ubatch-size", self.ubatch, 0),
            ("-t/--threads", self.threads, 0),
            ("--depth", self.depth, 1),
        ):
            if value < least:
                raise UsageError(f"{name} {value}: must be at least {least}")
