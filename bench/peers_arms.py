"""The arms of `tierrun bench peers`: which there are, how each is run, and what it says."""

import importlib.util
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tierrun.bench import peers_llama
from tierrun.bench.decode import DecodeRun
from tierrun.bench.peers_process import Output, run_capped
from tierrun.bench.peers_runs import Measured, Ran
from tierrun.bench.peers_setting import Setting
from tierrun.io.errors import UsageError

NAMES = ("tierrun", "tierrun-blind", "llama.cpp", "accelerate", "accelerate-experts")
"""`tierrun-blind` is without look-ahead. There is an arm for each set of further arguments."""

_ACCELERATE = {"accelerate": "auto", "accelerate-experts": "experts"}


@dataclass(frozen=True, slots=True)
class Arm:
    """A way of running the model; `command` as it is run, `parse` what it prints."""

    name: str
    command: Callable[[Setting], list[str]]
    parse: Callable[[Output], Ran]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("tierrun")

    def run(self, setting: Setting) -> tuple[Ran, Output]:
        """One run, from a cold page cache.

        Raises:
            Killed: it had not enough memory, or time.
            TierrunError: it failed in any other way.
        """
        output = run_capped(self.name, self.command(setting), setting)
        return self.parse(output), output


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
        return peers_llama.obstacle(setting)
    if name in _ACCELERATE:
        if setting.device != "cpu":
            return "it is compared on the CPU only"
        if not setting.files.checkpoint.is_dir():
            return f"{setting.directory} has no checkpoint: make the model with --codec bf16"
        if importlib.util.find_spec("accelerate") is None:
            return "not installed: pip install 'tierrun[peers]'"
    return None


def _make(name: str, setting: Setting) -> list[Arm]:
    if name == "llama.cpp":
        return [_llama(arguments) for arguments in setting.llama_arguments]
    if name in _ACCELERATE:
        return [_accelerate(name)]
    return [_tierrun(name, arguments) for arguments in setting.tierrun_arguments]


def _tierrun(name: str, arguments: str) -> Arm:
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
        words = [flag, *_words(options), *shlex.split(arguments)]
        return [*_module("tierrun.bench.decode"), str(setting.files.store), *words]

    return Arm(f"{name} {arguments}".strip(), command, _parse_tierrun)


def _parse_tierrun(output: Output) -> Ran:
    run = DecodeRun.from_json(output.text.splitlines()[-1])
    peak = output.peak_bytes or run.peak_rss
    tests = {f"tg{len(run.seconds)}": Measured(run.tokens_per_second, peak, output.seconds)}
    if run.prompt_tokens:
        speed = run.prompt_tokens / run.prompt_seconds
        tests[f"pp{run.prompt_tokens}"] = Measured(speed, peak, output.seconds)
    return Ran(tests, peak, run)


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

    return Arm(name, command, _parse_accelerate)


def _parse_accelerate(output: Output) -> Ran:
    from tierrun.bench.offloaded import OffloadedRun

    run = OffloadedRun.from_json(output.text.splitlines()[-1])
    peak = output.peak_bytes or run.peak_rss
    measured = Measured(run.tokens_per_second, peak, output.seconds)
    return Ran({f"tg{len(run.seconds)}": measured}, peak)


def _llama(arguments: str) -> Arm:
    command = partial(peers_llama.command, arguments=arguments)
    return Arm(f"llama.cpp {arguments}".strip(), command, peers_llama.parse)


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _words(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
