"""A child of the doctor: torch, CUDA and its GPUs. It prints what it knows after every step, so
that a step that hangs or crashes takes nothing from those before it."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierrun.io.errors import UsageError
from tierrun.tiers.budget import host_memory
from tierrun.tools.doctor.facts import LIFETIME, Cuda, Gds, Gpu, Pinned
from tierrun.tools.doctor.smi import query_links

if TYPE_CHECKING:
    import torch

_PIN_STEP, _MOST_PINNED = 256 << 20, 4 << 30
_PINNED_SHARE = 4
"""At most a quarter of what memory is free is tried."""

_COPY_BYTES = 64 << 20
_LOAD_SECONDS = 0.3
"""Of copies, until a resting link has its full speed back."""


def main() -> None:
    """Print the facts, step by step."""
    facts = Cuda(visible=os.environ.get("CUDA_VISIBLE_DEVICES"), supports=driver_supports())
    for step in (torch_facts, gpu_facts, pinned_facts, gds_facts):
        print(facts.model_dump_json(), flush=True)
        facts = step(facts)
    print(facts.model_dump_json(), flush=True)


def driver_supports() -> int | None:
    """The CUDA version that the driver supports, as 13000 for 13.0; None without a driver."""
    version = ctypes.c_int(0)
    try:
        failed = _libcuda().cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value if failed == 0 and version.value > 0 else None


def _libcuda() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def torch_facts(facts: Cuda) -> Cuda:
    """Which torch there is."""
    try:
        import torch
    except Exception as error:  # libraries that are missing raise anything
        return facts.model_copy(update={"torch_error": _first_line(error)})
    found = {"torch": str(torch.__version__), "built_for": torch.version.cuda}
    return facts.model_copy(update=found)


def gpu_facts(facts: Cuda) -> Cuda:
    """Every GPU that CUDA sees, or why it sees none."""
    if facts.torch is None:
        return facts
    import torch

    from tierrun.engine.devices import obstacle_to_gpu

    obstacle = obstacle_to_gpu(0)
    initialised: Callable[[], bool] = torch.cuda.is_initialized
    if not initialised():
        return facts.model_copy(update={"gpus": (), "obstacle": obstacle})
    gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
    return facts.model_copy(update={"gpus": gpus, "obstacle": None if gpus else obstacle})


def _gpu(index: int) -> Gpu:
    import torch

    from tierrun.engine.devices import obstacle_to_gpu

    obstacle, free, total = obstacle_to_gpu(index), None, None
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # in exclusive use, or its memory is full
        obstacle = obstacle or _first_line(error)
    return Gpu(
        name=torch.cuda.get_device_name(index),
        capability=torch.cuda.get_device_capability(index),
        free=free,
        total=total,
        address=_address(index),
        obstacle=obstacle,
    )


def _address(index: int) -> str | None:
    """Where CUDA's device `index` is on the PCI bus; CUDA numbers only those that are visible."""
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(32)
    try:
        cuda = _libcuda()
        failed = cuda.cuDeviceGet(ctypes.byref(device), index)
        failed = failed or cuda.cuDeviceGetPCIBusId(name, len(name), device)
    except (OSError, AttributeError):
        return None
    return None if failed else name.value.decode().lower()


def usable(facts: Cuda) -> list[int]:
    """The numbers of the GPUs that can be computed on."""
    return [index for index, gpu in enumerate(facts.gpus or ()) if gpu.obstacle is None]


def pinned_facts(facts: Cuda) -> Cuda:
    """How much memory can be pinned, within a cap; and the links while copies run from it."""
    if not usable(facts):
        return facts
    import torch

    from tierrun.tiers.memory import PinnedMemory

    memory = PinnedMemory(torch.device("cuda", usable(facts)[0]), strict=True)
    tried = min(_MOST_PINNED, host_memory().free // _PINNED_SHARE)
    held: list[torch.Tensor] = []  # all of it at once: memory that is pinned anew proves less
    obstacle = None
    try:
        for _ in range(tried // _PIN_STEP):
            held.append(memory.allocate(_PIN_STEP))
    except UsageError as error:
        obstacle = str(error)
    pinned = Pinned(nbytes=len(held) * _PIN_STEP, obstacle=obstacle)
    source = held[0] if held else torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    with copies(source[:_COPY_BYTES], usable(facts)) as loaded:
        links = tuple(query_links(loaded))
    for part in held:
        memory.release(part)
    return facts.model_copy(update={"pinned": pinned, "links": links})


@contextmanager
def copies(source: "torch.Tensor", indices: list[int]) -> Iterator[bool]:
    """Copy `source` to GPUs again and again meanwhile; False where that cannot be done."""
    import torch

    try:
        targets = [torch.empty_like(source, device=f"cuda:{index}") for index in indices]
    except (RuntimeError, AssertionError):  # no memory there, or no CUDA in this torch
        yield False
        return
    ended, warm = threading.Event(), threading.Event()
    thread = threading.Thread(target=_copy_until, args=(ended, warm, source, targets))
    thread.start()
    try:
        ended.wait(_LOAD_SECONDS)
        yield warm.is_set()
    finally:
        ended.set()
        thread.join()


def _copy_until(
    ended: threading.Event,
    warm: threading.Event,
    source: "torch.Tensor",
    targets: "list[torch.Tensor]",
) -> None:
    import torch

    while not ended.is_set():
        for target in targets:
            target.copy_(source, non_blocking=True)
        for target in targets:
            torch.cuda.synchronize(target.device)
        warm.set()


def gds_facts(facts: Cuda) -> Cuda:
    """Whether there is GPUDirect Storage, tried on a file of Python's."""
    if not usable(facts):
        return facts
    from tierrun.io import gds

    obstacle = gds.obstacle_to_gds(Path(threading.__file__))
    if obstacle is not None:
        found = Gds(usable=False, native=False, reason=obstacle)
    else:
        mode = gds.mode()
        found = Gds(usable=True, native=mode.native, reason=mode.reason)
    return facts.model_copy(update={"gds": found})


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


if __name__ == "__main__":
    signal.alarm(LIFETIME)
    main()
