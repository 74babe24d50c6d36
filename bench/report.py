"""What every benchmark prints and writes: medians with their spread, and one JSON document.

The document says where, with what code and by which command its numbers were made.
"""

import json
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

import torch
import typer
from rich.console import Console

from tierrun.io.errors import TierrunError

PACKAGES = ("torch", "transformers", "numpy", "uvloop")


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


def document(benchmark: str, results: dict[str, Any]) -> dict[str, Any]:
    """`results` with the machine, the commit and the command that made them."""
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"tierrun.bench.{benchmark}", *sys.argv[1:]]),
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
        **(_gpu() if torch.cuda.is_available() else {}),
    }


def _gpu() -> dict[str, Any]:
    """The GPUs, as their driver describes them, and what programs them."""
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
