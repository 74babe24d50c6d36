"""What every benchmark prints and writes: medians with their spread, and one JSON document.

The document says where, with what code and by which command its numbers were made, and which
version of tierrun and of this form (`schema`) wrote it.
"""

import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.console import Console

import tierrun
from tierrun.io.errors import TierrunError

SCHEMA = 1
"""Of the documents; another number is another form, which programs of this one cannot read."""

PACKAGES = ("torch", "transformers", "numpy", "uvloop")

_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Of NVIDIA's driver; the second is WSL's."""

_FILE_WIDTH = 120


class Spread(NamedTuple):
    """The median of several rounds, and the least and largest of them."""

    median: float
    least: float
    largest: float

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """`1.05 (0.98–1.20)`"""
        middle, least, largest = (f"{value * scale:.{digits}f}" for value in self)
        return f"{middle} ({least}–{largest})"


def open_console() -> Console:
    """The terminal; as wide as the tables where the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def run_script(main: Callable[..., None]) -> None:
    """`main` as a command line; what a user or a disk causes is one line, no traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except TierrunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The least of the values, in ascending order, that `percent` of them do not exceed: fio's
    definition, without its histogram's rounding. Of at least one value."""
    return ascending[max(0, math.ceil(percent / 100 * len(ascending)) - 1)]


def has_gpu_driver() -> bool:
    """Whether NVIDIA's driver is there; if not, torch, which takes seconds to import, need not be
    asked about GPUs."""
    return any(device.exists() for device in _GPU_DEVICES)


def document(
    benchmark: str, results: dict[str, Any], program: Sequence[str] | None = None
) -> dict[str, Any]:
    """`results` with the machine, the commit and the command that made them.

    `program` is what the command line's arguments were given to; by default the script.
    """
    script = ("python", "-m", f"tierrun.bench.{benchmark}")
    return {
        "schema": SCHEMA,
        "tierrun": tierrun.__version__,
        "benchmark": benchmark,
        "command": shlex.join([*(script if program is None else program), *sys.argv[1:]]),
        "commit": _commit(),
        "machine": _machine(),
        **results,
    }


def emit(results: dict[str, Any], file: Path | None) -> None:
    """The document as the last line of the output, and in `file`."""
    print(json.dumps(results))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


def _commit() -> str:
    """The commit of the checkout that this module lies in; `+` where it has changes."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
    return _output(command) or "unknown"


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        **(_gpu() if has_gpu_driver() else {}),
    }


def _gpu() -> dict[str, Any]:
    """The GPUs that torch sees, as their driver describes them, and what programs them."""
    import torch

    if not torch.cuda.is_available():
        return {}
    fields = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "nvidia_smi": _output(command).splitlines(),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _output(command: Sequence[str]) -> str:
    """What `command` prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
