"""What the runs of several benchmarks begin with: device, memory, a line that says what is done."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from tierrun.bench.report import has_gpu_driver
from tierrun.io.errors import DeviceError, UsageError
from tierrun.io.extent import format_bytes
from tierrun.tiers.budget import host_memory

if TYPE_CHECKING:
    import torch

_started = time.perf_counter()


def say(text: str) -> None:
    """Progress, on stderr at once: a run that is cut off has still shown what it found."""
    print(f"[{time.perf_counter() - _started:7.1f} s] {text}", file=sys.stderr, flush=True)


def gpu_asked_for(asked: str) -> "torch.device | None":
    """The GPU that `--device` means; None for none. torch is not imported to find out that there
    is none.

    Raises:
        UsageError: not a device, one that is not there, or one that is too old.
    """
    if asked == "cpu" or (asked == "auto" and not has_gpu_driver()):
        return None
    from tierrun.engine.devices import choose_device

    device, _ = choose_device(asked)
    return device if device.type == "cuda" else None


def check_memory(nbytes: int, choice: str) -> None:
    """Half of the free host memory is left alone.

    Raises:
        UsageError: `nbytes` are more than the other half; `choice` says what takes less.
    """
    free = host_memory().free
    if nbytes > free // 2:
        raise UsageError(
            f"this takes {format_bytes(nbytes)} of memory, more than half of the "
            f"{format_bytes(free)} that are free: choose {choice}"
        )


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what is being done; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as shown:
        yield lambda text: shown.update(text)


@contextmanager
def gpu_errors() -> Iterator[None]:
    """What CUDA raises becomes a DeviceError, in one line."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip().splitlines()
        if not said or "CUDA" not in said[0]:
            raise
        raise DeviceError(f"the GPU failed: {said[0]}") from error
