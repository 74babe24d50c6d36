"""This machine's rates: measured in a few seconds, and kept in the user's cache for a day.

Medians count, so that a moment of somebody else's work does no harm; where others keep the machine
busy, that is said.
"""

import itertools
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from tierrun.bench.caches import cache_bytes
from tierrun.engine.codecs.weight import matrix_view
from tierrun.engine.kernels.cpu import cpu_kernels
from tierrun.engine.options import Options
from tierrun.io.extent import PAGE
from tierrun.io.profiles import cache_directory
from tierrun.io.store import RecordClass
from tierrun.io.whole import write_whole
from tierrun.tiers.budget import host_memory
from tierrun.tiers.memory import OrdinaryMemory
from tierrun.tools.plan.overhead import layer_overhead

log = logging.getLogger(__name__)

_DISTINCT_BYTES = 256 << 20
"""Of memory to read in turn, beside what the last cache holds."""

_DEVICE_BYTES = 1 << 30
_SIDE = 1024
_SECONDS, _LEAST_RUNS = 0.5, 3

_SANE_BYTE = 0x2C
"""Codes and scales made of it are ordinary numbers in every codec."""

_KEPT_SECONDS = 86400.0
_BUSY = 0.7
"""Work under way per core from which on others are said to use the machine."""


class Host(NamedTuple):
    """Bytes per second of memory reads, FLOP per second of products."""

    memory: float
    cpu_flops: float


class Device(NamedTuple):
    """Bytes per second over the bus and of the GPU's memory, FLOP per second of products."""

    pcie: float
    vram: float
    gpu_flops: float


class Machine:
    """Measures what is asked for; `fresh`: again, whatever is kept."""

    def __init__(self, *, fresh: bool = False) -> None:
        self._kept = _Kept(cache_directory().parent / "rates.json", fresh)

    def host(self) -> Host:
        """What the CPU does with the engine's threads."""
        return Host(*self._kept.get(_host_key("rates"), _measure_host))

    def kernels(self, record: RecordClass) -> float:
        """Bytes per second that the CPU makes of records like `record`, a token at a time."""
        codecs = [f"{m.codec} {list(m.shape)}" for m in record.matrices if len(m.shape) == 2]
        key = _host_key(f"one token, {', '.join(codecs)}")
        return self._kept.get(key, lambda: (_kernel_bandwidth(record),))[0]

    def overhead(self, top_k: int) -> float:
        """Seconds that a layer takes on the CPU beside its weights and reads."""
        key = _host_key(f"a layer of a miniature, top-{top_k}")
        return self._kept.get(key, lambda: (layer_overhead(top_k),))[0]

    def device(self, device: torch.device) -> Device:
        """What the GPU `device` does."""
        key = f"device {torch.cuda.get_device_name(device)} {device.index or 0}"
        return Device(*self._kept.get(key, lambda: _measure_device(device)))


def _host_key(what: str) -> str:
    threads = Options().kernel_threads
    return f"{_cpu_name()} ({platform.machine()}), {threads} of {os.cpu_count()} threads: {what}"


@contextmanager
def _threads() -> Iterator[None]:
    """torch computes with the engine's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(Options().num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_threads()
def _measure_host() -> tuple[float, ...]:
    data = OrdinaryMemory().allocate(_distinct_bytes()).fill_(1).view(torch.int32)
    memory = data.nbytes / _typically(lambda: data.sum(dtype=torch.int32))
    x = torch.ones(_SIDE, _SIDE)
    return memory, 2 * _SIDE**3 / _typically(lambda: torch.mm(x, x))


@_threads()
def _kernel_bandwidth(record: RecordClass) -> float:
    """Bytes per second of one token through records in turn."""
    count = max(1, _distinct_bytes() // record.nbytes)
    kernels = cpu_kernels(Options().kernel_threads, exact=False)
    matrices = [m for m in record.matrices if len(m.shape) == 2]
    memory = OrdinaryMemory().allocate(count * record.nbytes).fill_(_SANE_BYTE)
    records = (memory[i * record.nbytes : (i + 1) * record.nbytes] for i in range(count))
    inputs = [torch.ones(1, matrix.shape[1]) for matrix in matrices]
    turns = itertools.cycle([[matrix_view(one, m) for m in matrices] for one in records])

    def compute() -> None:
        for x, weight in zip(inputs, next(turns), strict=True):
            kernels.linear(x, weight)

    return sum(m.extent.nbytes for m in matrices) / _typically(compute)


def _distinct_bytes() -> int:
    """More than caches hold (a virtual machine sees its host's), but not much of what is free."""
    return min(_DISTINCT_BYTES + cache_bytes(), host_memory().free // 4 // PAGE * PAGE)


def _measure_device(device: torch.device) -> tuple[float, ...]:
    from tierrun.engine.gpu.rates import product_flops, upload_bandwidth

    data = torch.zeros(_DEVICE_BYTES // 4, dtype=torch.int32, device=device)

    def read() -> None:
        data.sum(dtype=torch.int32)
        torch.cuda.synchronize(device)

    vram = data.nbytes / _typically(read)
    return upload_bandwidth(device), vram, product_flops(device)


def _typically(work: Callable[[], object]) -> float:
    """Seconds of the median run, of those that half a second takes: what decoding, which takes
    longer than a moment, can count on."""
    work()
    seconds: list[float] = []
    deadline = time.perf_counter() + _SECONDS
    while len(seconds) < _LEAST_RUNS or time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


class _Kept:
    """Numbers by name in a small file, each for a day; where it cannot be used, it is not."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self._path = path
        self._since = time.time() if fresh else time.time() - _KEPT_SECONDS
        self._known = self._read()

    def get(self, key: str, measure: Callable[[], tuple[float, ...]]) -> list[float]:
        """What is kept under `key`, else measured now and kept."""
        known = self._known.get(key)
        if not known or not self._since <= known[0] <= time.time():
            _say_what_happens(self._path)
            log.debug("measuring: %s", key)
            known = self._known[key] = [time.time(), *measure()]
            self._write()
        return known[1:]

    def _read(self) -> dict[str, list[float]]:
        try:
            document = json.loads(self._path.read_text())
            return {str(key): [float(x) for x in row] for key, row in document.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("%s cannot be used (%s): measuring again", self._path, error)
            return {}

    def _write(self) -> None:
        try:
            write_whole(self._path, json.dumps(self._known, indent=1) + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s)", self._path, error.strerror or error)


@lru_cache
def _say_what_happens(path: Path) -> None:
    """Once, before measuring is itself what the machine is busy with."""
    log.info("measuring this machine, a few seconds (kept for a day in %s)", path)
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > _BUSY * cores:
        log.warning(
            "this machine is busy (load %.1f on %d cores), so rates may come out too low; "
            "--measure measures them again",
            load,
            cores,
        )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
