"""The arms of `tierrun bench peers`: which there are, how each is run, and what it says."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from tierrun.bench.cgroup import MemoryCgroup, drop_caches, memory_cgroup
from tierrun.bench.decode import DecodeRun
from tierrun.bench.stream import routing_of
from tierrun.bench.synthetic import PeerFiles
from tierrun.bench.synthetic_models import Routing
from tierrun.engine.architecture import read_config
from tierrun.io.errors import TierrunError, UsageError
from tierrun.io.extent import format_bytes
from tierrun.io.store import MODEL_DIR

NAMES = ("tierrun", "tierrun-blind", "llama.cpp", "accelerate", "accelerate-experts")
"""`tierrun-blind` is without look-ahead; of llama.cpp there is an arm for each set of arguments."""

_ACCELERATE = {"accelerate": "auto", "accelerate-experts": "experts"}
_LLAMA_ROUNDS = 2
"""Repetitions within llama-bench; the last one counts, the others fill the page cache."""


class Killed(Exception):
    """An arm that did not live: its message says why."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms share. `memory` in bytes, None: no cap; `prompt` 0: no prompts. `seconds`: what
    a run may take."""

    directory: Path
    memory: int | None = None
    ram: str = "1GiB"
    vram: str = "auto"
    device: str = "cpu"
    warmup: int = 32
    tokens: int = 32
    prompt: int = 0
    accelerate_tokens: int = 4
    threads: int = 0
    seconds: float = 600.0
    llama_bench: Path | None = None
    llama_arguments: tuple[str, ...] = ("",)
    arms: tuple[str, ...] | None = None

    @property
    def files(self) -> PeerFiles:
        return PeerFiles.under(self.directory)

    @property
    def stream(self) -> Routing:
        """Of the tokens: llama-bench's where it takes part, else the store's own."""
        if self.llama_bench is not None:
            return Routing.UNIFORM
        return routing_of(read_config(self.files.store / MODEL_DIR))

    @property
    def cold(self) -> str:
        """What the page cache has when an arm begins, in a clause."""
        return (
            "page cache dropped before" if os.geteuid() == 0 else "page cache as it was (no root)"
        )


class Measured(NamedTuple):
    """A test of one run: its speed, the run's peak of memory, and how long all of it took."""

    tokens_per_second: float
    peak_bytes: int
    seconds: float


class Ran(NamedTuple):
    """One run: by llama-bench's name of each test what was measured; `decode` is ours."""

    tests: dict[str, Measured]
    peak_bytes: int
    decode: DecodeRun | None = None


class Output(NamedTuple):
    """Of a process: what it printed, its peak of memory (0: unknown), and its seconds."""

    text: str
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Arm:
    """A way of running the model; `command` as it is run, `parse` what it prints."""

    name: str
    command: Callable[[Setting], list[str]]
    parse: Callable[[Output], Ran]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("tierrun")

    def run(self, setting: Setting) -> Ran:
        """One run, from a cold page cache.

        Raises:
            Killed: it had not enough memory, or time.
            TierrunError: it failed in any other way.
        """
        return self.parse(run_capped(self.name, self.command(setting), setting))


def arms_of(setting: Setting) -> list[Arm]:
    """Those that were asked for; else all that can be run here, and it is no error that others
    cannot.

    Raises:
        UsageError: no store, or one that was asked for and cannot be run; says why.
    """
    if not setting.files.store.is_dir():
        raise UsageError(
            f"{setting.directory} has no store; make all forms of a model with "
            f"`tierrun bench store {setting.directory} --like small --peers`"
        )
    arms = []
    for name in setting.arms or NAMES:
        if name not in NAMES:
            raise UsageError(f"--arms {name}: choose from {', '.join(NAMES)}")
        obstacle = _obstacle(name, setting)
        if obstacle is None:
            arms += _make(name, setting)
        elif setting.arms is not None or (name == "llama.cpp" and setting.llama_bench is not None):
            raise UsageError(f"{name}: {obstacle}")
    return arms


def _obstacle(name: str, setting: Setting) -> str | None:
    """Why an arm cannot be run, or None."""
    if name == "llama.cpp":
        return _llama_obstacle(setting)
    if name in _ACCELERATE:
        if setting.device != "cpu":
            return "it is compared on the CPU only"
        if not setting.files.checkpoint.is_dir():
            return f"{setting.directory} has no checkpoint: make the model with --codec bf16"
        if importlib.util.find_spec("accelerate") is None:
            return "not installed: pip install 'tierrun[peers]'"
    return None


def _llama_obstacle(setting: Setting) -> str | None:
    if setting.llama_bench is None:
        return "give --llama-bench PROGRAM"
    if not os.access(setting.llama_bench, os.X_OK) or setting.llama_bench.is_dir():
        return f"{setting.llama_bench} is not a program"
    if not setting.files.gguf.is_file():
        return f"{setting.directory} has no model.gguf: make it with bench store --peers"
    return None


def _make(name: str, setting: Setting) -> list[Arm]:
    if name == "llama.cpp":
        return [_llama(arguments) for arguments in setting.llama_arguments]
    if name in _ACCELERATE:
        return [_accelerate(name)]
    return [_tierrun(name)]


def _tierrun(name: str) -> Arm:
    def command(setting: Setting) -> list[str]:
        flag = "--no-lookahead" if name == "tierrun-blind" else "--lookahead"
        options = {
            "ram": setting.ram,
            "vram": setting.vram,
            "device": setting.device,
            "warmup": setting.warmup,
            "tokens": setting.tokens,
            "prompt": setting.prompt,
            "threads": setting.threads,
            "routing": setting.stream,
        }
        return [*_module("tierrun.bench.decode"), str(setting.files.store), flag, *_words(options)]

    def parse(output: Output) -> Ran:
        run = DecodeRun.from_json(output.text.splitlines()[-1])
        peak = output.peak_bytes or run.peak_rss
        tests = {
            f"tg{len(run.seconds)}": Measured(run.tokens_per_second, peak, output.seconds),
        }
        if run.prompt_tokens:
            speed = run.prompt_tokens / run.prompt_seconds
            tests[f"pp{run.prompt_tokens}"] = Measured(speed, peak, output.seconds)
        return Ran(tests, peak, run)

    return Arm(name, command, parse)


def _accelerate(name: str) -> Arm:
    def command(setting: Setting) -> list[str]:
        options = {
            "map": _ACCELERATE[name],
            "ram": setting.ram,
            "warmup": setting.warmup,
            "tokens": setting.accelerate_tokens,
            "threads": setting.threads,
            "routing": setting.stream,
        }
        files = [str(setting.files.checkpoint), str(setting.directory / "offload")]
        return [*_module("tierrun.bench.offloaded"), *files, *_words(options)]

    def parse(output: Output) -> Ran:
        from tierrun.bench.offloaded import OffloadedRun

        run = OffloadedRun.from_json(output.text.splitlines()[-1])
        peak = output.peak_bytes or run.peak_rss
        measured = Measured(run.tokens_per_second, peak, output.seconds)
        return Ran({f"tg{len(run.seconds)}": measured}, peak)

    return Arm(name, command, parse)


def _llama(arguments: str) -> Arm:
    def command(setting: Setting) -> list[str]:
        numbers = ["-p", str(setting.prompt), "-n", str(setting.tokens), "-r", str(_LLAMA_ROUNDS)]
        threads = ["-t", str(setting.threads)] if setting.threads else []
        files = [str(setting.llama_bench), "-m", str(setting.files.gguf)]
        return [*files, *numbers, *threads, "-o", "json", *shlex.split(arguments)]

    return Arm(f"llama.cpp {arguments}".strip(), command, parse_llama)


def parse_llama(output: Output) -> Ran:
    """llama-bench's `-o json`: of each test the last repetition.

    Raises:
        TierrunError: it is not that.
    """
    try:
        rows = json.loads(output.text[output.text.index("[") :])
        tests = {}
        for row in rows:
            kind, tokens = ("tg", row["n_gen"]) if row["n_gen"] else ("pp", row["n_prompt"])
            speed = float(row["samples_ts"][-1])
            tests[f"{kind}{tokens}"] = Measured(speed, output.peak_bytes, output.seconds)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise TierrunError(f"llama-bench printed no results that are known ({error!r})") from None
    return Ran(tests, output.peak_bytes)


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _words(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run_capped(name: str, command: Sequence[str], setting: Setting) -> Output:
    """Run `command` in a cgroup of the setting's memory, if it has one.

    Raises:
        Killed, TierrunError: see `Arm.run`.
    """
    if setting.memory is not None or os.geteuid() == 0:
        drop_caches()
    offload = setting.directory / "offload"
    capped = nullcontext() if setting.memory is None else memory_cgroup(setting.memory)
    try:
        with capped as cgroup, tempfile.TemporaryFile("w+") as errors:
            return _run(name, command, setting, cgroup, errors)
    finally:
        shutil.rmtree(offload, ignore_errors=True)


def _run(
    name: str,
    command: Sequence[str],
    setting: Setting,
    cgroup: MemoryCgroup | None,
    errors: IO[str],
) -> Output:
    wrapped, started = command if cgroup is None else cgroup.command(command), time.perf_counter()
    try:
        run = subprocess.run(
            wrapped, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=setting.seconds
        )
    except subprocess.TimeoutExpired:
        raise Killed(f"not done after {setting.seconds:.0f} s (--timeout)") from None
    usage = cgroup.usage() if cgroup is not None else None
    if run.returncode == 0:
        peak = usage.peak_bytes if usage is not None else 0
        return Output(run.stdout, peak, time.perf_counter() - started)
    if run.returncode == -9 or (usage is not None and usage.killed):
        cap = f" in {format_bytes(setting.memory)}" if setting.memory else ""
        raise Killed(f"killed for want of memory{cap}")
    errors.seek(0)
    last = errors.read().strip().splitlines()[-1:] or ["no message"]
    raise TierrunError(f"{name} ended with {run.returncode}: {last[0]}")
