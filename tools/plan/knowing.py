"""The rates of a machine, each from where it is best known: given, measured here, or assumed."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tierrun.engine.devices import choose_device
from tierrun.io.errors import UsageError
from tierrun.io.store import Manifest, RecordClass
from tierrun.tools.plan import drive
from tierrun.tools.plan.machine import Machine
from tierrun.tools.plan.rates import Rates, parse_assumed
from tierrun.tools.plan.recode import CODEC_NAMES, matrix_bytes
from tierrun.tools.plan.request import Request
from tierrun.tools.plan.sketch import arrange
from tierrun.tools.plan.subject import Subject

GPU_OVERHEAD = 80e-6
"""Seconds a layer of one token on a GPU beside its weights: launches, the exchange with the host.
What 35B- and 30B-like models took on an H100 with all experts in VRAM (gpu_decode_*.json)."""

IN_PLACE = 0.65
"""Of what copies over the bus reach, what kernels do that read RAM in place (gpu_lanes.json)."""

ASSUMED_PCIE, ASSUMED_FLOPS = 25e9, 160
"""Of a GPU that is not here: bytes per second over PCIe 4; products per byte of its memory."""

MEASURED = "measured"


@dataclass(frozen=True, slots=True)
class Target:
    """What computes: `device` is None where a GPU that is not here is assumed; `given` are the
    rates of `--assume`."""

    device: torch.device | None
    given: dict[str, float]

    @property
    def is_gpu(self) -> bool:
        return self.device is None or self.device.type == "cuda"


class Known(NamedTuple):
    """The machine's rates and whence each is known."""

    rates: Rates
    sources: dict[str, str]


class _Learnt:
    """Numbers by name, the first that is learnt stays."""

    def __init__(self, given: dict[str, float]) -> None:
        self.numbers = dict(given)
        self.sources = dict.fromkeys(given, "as given with --assume")

    def learn(self, name: str, find: Callable[[], float], source: str) -> None:
        if name not in self.numbers:
            self.numbers[name], self.sources[name] = find(), source


def target_of(request: Request) -> Target:
    """The device that `request` is for.

    Raises:
        UsageError: `--assume` that is not understood, or not for this device; no such device.
    """
    given = parse_assumed(request.assume)
    if "vram" in given:
        if request.device == "cpu":
            raise UsageError("--assume vram=… is for a GPU, and --device cpu is not one")
        return Target(None, given)
    return Target(choose_device(request.device).device, given)


def know(
    target: Target,
    request: Request,
    subject: Subject,
    manifest: Manifest,
    looked_up: Collection[str],
    machine: Machine,
) -> Known:
    """The rates for a model laid out as `manifest`; only what its device needs is measured.

    Raises:
        UsageError: a `--nvme-dir` that cannot be measured.
    """
    learnt = _Learnt(target.given)
    _learn_drive(learnt, request, subject, manifest)
    if target.device is None:
        _learn_assumed_gpu(learnt)
    elif target.is_gpu:
        _learn_gpu(learnt, target.device, machine)
    else:
        _learn_host(learnt, manifest, looked_up, machine)
    return Known(Rates(**learnt.numbers), learnt.sources)


def _learn_drive(learnt: _Learnt, request: Request, subject: Subject, manifest: Manifest) -> None:
    if "drive" not in learnt.numbers:
        found = _drive(request, subject, manifest)
        learnt.learn("drive", lambda: found.bandwidth, found.source)
        learnt.learn("latency", lambda: found.latency, found.source)
    learnt.learn("latency", lambda: drive.UNKNOWN.latency, "assumed")


def _learn_host(
    learnt: _Learnt, manifest: Manifest, looked_up: Collection[str], machine: Machine
) -> None:
    """`cpu` that is given stands for resident weights too."""
    if "cpu" in learnt.numbers:
        cpu = learnt.numbers["cpu"]
        learnt.learn("cpu_resident", lambda: cpu, learnt.sources["cpu"])
    expert, resident = typical(manifest), _largest_resident(manifest, looked_up)
    learnt.learn("cpu", lambda: machine.kernels(expert), MEASURED)
    learnt.learn("cpu_resident", lambda: machine.kernels(resident), MEASURED)
    learnt.learn("memory", lambda: machine.host().memory, MEASURED)
    learnt.learn("cpu_flops", lambda: machine.host().cpu_flops, MEASURED)
    top_k = manifest.layers[0].top_k
    learnt.learn("overhead", lambda: machine.overhead(top_k), "measured on a miniature model")


def _learn_gpu(learnt: _Learnt, device: torch.device, machine: Machine) -> None:
    learnt.learn("pcie", lambda: machine.device(device).pcie, MEASURED)
    learnt.learn("vram", lambda: machine.device(device).vram, MEASURED)
    learnt.learn("gpu_flops", lambda: machine.device(device).gpu_flops, MEASURED)
    _learn_constants(learnt)


def _learn_assumed_gpu(learnt: _Learnt) -> None:
    flops = ASSUMED_FLOPS * learnt.numbers["vram"]
    learnt.learn("pcie", lambda: ASSUMED_PCIE, "assumed: PCIe 4")
    learnt.learn("gpu_flops", lambda: flops, "assumed: 160 FLOP per byte of memory")
    _learn_constants(learnt)


def _learn_constants(learnt: _Learnt) -> None:
    learnt.learn("in_place", lambda: IN_PLACE * learnt.numbers["pcie"], "assumed: 65 % of pcie")
    learnt.learn("overhead", lambda: GPU_OVERHEAD, "assumed: what an H100 takes")


def _largest_resident(manifest: Manifest, looked_up: Collection[str]) -> RecordClass:
    """The kind of matrix that most resident bytes a token reads are, as if it were an expert."""
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for resident in manifest.residents:
        codec = CODEC_NAMES.get(resident.dtype, resident.dtype)
        if len(resident.shape) == 2 and resident.name not in looked_up:
            found[codec, resident.shape] += resident.extent.nbytes
    if not found:
        return typical(manifest)
    codec, shape = found.most_common(1)[0][0]
    return arrange([("weight", codec, shape, matrix_bytes(codec, shape))])


def typical(manifest: Manifest) -> RecordClass:
    """The class of most records."""
    layers = range(len(manifest.layers))
    counts = Counter(manifest.class_of(number) for number in layers)
    return counts.most_common(1)[0][0]


def _drive(request: Request, subject: Subject, manifest: Manifest) -> drive.Drive:
    if subject.store is not None:
        return drive.of_store(subject.store)
    if request.directories:
        return drive.of_directories(request.directories, typical(manifest).nbytes)
    return drive.UNKNOWN
