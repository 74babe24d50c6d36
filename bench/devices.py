"""What the benchmarks of a device share: how the engine is loaded, and how fast memory is."""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from tierrun.bench.running import say as say
from tierrun.engine.engine import Engine, load
from tierrun.io.errors import TierrunError, UsageError
from tierrun.io.extent import parse_bytes
from tierrun.io.store import Manifest, read_manifest
from tierrun.tiers.ledger import Counters

_SHARE = re.compile(r"^(\d+(?:\.\d+)?)%experts$")
_REPEATS = 5
_PROBE_BYTES = 2 << 30
_CPU_PROBE_BYTES = 256 << 20

Device = Annotated[str, typer.Option(help="cuda, or cpu to try the script out.")]
VramBudget = Annotated[
    str, typer.Option(help="auto, 0, 8GiB, 50%, or 20%experts (of their bytes).")
]
RamBudget = Annotated[str, typer.Option(help="The same, for RAM.")]
Compile = Annotated[str, typer.Option("--compile", help="auto, on or off.")]
Graphs = Annotated[bool, typer.Option(help="CUDA graphs.")]
Exact = Annotated[bool, typer.Option(help="The same bits for any budget.")]
ContextSize = Annotated[int, typer.Option(help="0: what this run needs.")]
Ubatch = Annotated[int, typer.Option(help="Tokens of a prompt at once; 0: the engine's choice.")]
Io = Annotated[str, typer.Option(help="The reader.")]
LaneMode = Annotated[str, typer.Option("--lanes", help="Experts in RAM: auto, gpu, cpu.")]
Policy = Annotated[str, typer.Option(help="Replacement: rates, lfru, lru, layers.")]
Threads = Annotated[int, typer.Option(help="0: all cores; torch one less.")]
Card = Annotated[str, typer.Option(help="As if the card had so much (16GiB): the rest is taken.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the JSON document here.")]


@dataclass(frozen=True, slots=True)
class Setting:
    """How an engine is loaded; budgets may be shares of the experts' bytes (`20%experts`)."""

    device: str = "cuda"
    vram: str = "auto"
    ram: str = "auto"
    compile: str = "auto"
    graphs: bool = True
    exact: bool = False
    context: int = 0
    ubatch: int = 0
    io: str = "auto"
    threads: int = 0
    lanes: str = "auto"
    policy: str = "rates"

    def load(self, store: Path, *others: Path) -> Engine:
        """An engine on `store`, with the `other` directories that it lies in; what only a GPU has
        is left out on the CPU.

        Raises:
            TierrunError: as `tierrun.load`.
        """
        manifest = read_manifest(store)
        options: dict[str, Any] = {
            "device": self.device,
            "vram": budget(self.vram, manifest),
            "ram": budget(self.ram, manifest),
            "context": self.context,
            "io": self.io,
            "threads": self.threads,
            "policy": self.policy,
            "ubatch": self.ubatch,
        }
        if self.device != "cpu":
            options |= {"compile": self.compile, "graphs": self.graphs, "exact": self.exact}
            options["lanes"] = self.lanes
        return load([store, *others], **options)


def budget(text: str, manifest: Manifest) -> str:
    """A budget as the engine takes it."""
    share = _SHARE.match(text)
    return text if share is None else str(int(float(share[1]) / 100 * manifest.expert_bytes))


def check_device(device: str) -> None:
    """Before anything slow.

    Raises:
        UsageError: no such device here.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no GPU here; --device cpu tries it out")


def synchronise(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def check_bytes(engine: Engine, device: str) -> None:
    """Compare every expert in VRAM with the store's checksums.

    Raises:
        TierrunError: some differ; names the first.
    """
    if device == "cpu":
        return
    backend: Any = engine.backend  # the method is the GPU's
    damaged = backend.damaged()
    if damaged:
        raise TierrunError(f"{len(damaged)} experts in VRAM are damaged, the first is {damaged[0]}")
    say("every expert in VRAM has the store's bytes")


def fill(engine: Engine, device: str) -> float:
    """Load the hot tier by running through all experts; seconds. Nothing to do on the CPU."""
    started = time.perf_counter()
    if device != "cpu":
        gpu_engine: Any = engine  # the method is the GPU's
        gpu_engine.warm_up()
        synchronise(device)
    return time.perf_counter() - started


class Bandwidths(NamedTuple):
    """Bytes per second: reading the device's memory, and copying pinned memory to the device."""

    memory: float
    upload: float


def measure_bandwidths(device: str) -> Bandwidths:
    """The best of several large reads, copies and uploads; leaves no memory taken."""
    found = _bandwidths(device, (_CPU_PROBE_BYTES if device == "cpu" else _PROBE_BYTES) // 4)
    if device != "cpu":
        torch.cuda.empty_cache()
    return found


def _bandwidths(device: str, count: int) -> Bandwidths:
    data, other = torch.ones(count, device=device), torch.ones(count, device=device)
    host = torch.ones(count // 8, pin_memory=device != "cpu")
    part = other[: len(host)]
    read = data.nbytes / _best(device, lambda: data.sum())
    copy = 2 * data.nbytes / _best(device, lambda: other.copy_(data))
    upload = host.nbytes / _best(device, lambda: part.copy_(host, non_blocking=True))
    return Bandwidths(max(read, copy), upload)


def _best(device: str, work: Callable[[], object]) -> float:
    """Seconds of the quickest of several runs."""
    seconds = []
    for _ in range(_REPEATS):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def bytes_per_token(manifest: Manifest) -> int:
    """Weights that one token reads: its experts, and every resident weight but the embedding.

    A tied embedding is read whole, as the output head.
    """
    experts = sum(
        layer.top_k * manifest.class_of(i).nbytes for i, layer in enumerate(manifest.layers)
    )
    names = {resident.name for resident in manifest.residents}
    untied = any(name.endswith("lm_head.weight") for name in names)
    residents = sum(
        resident.extent.nbytes
        for resident in manifest.residents
        if not (untied and resident.name.endswith("embed_tokens.weight"))
    )
    return experts + residents


def total(counters: Iterable[Counters]) -> Counters:
    """The sum of several tokens' counters."""
    rows = list(counters)
    names = [field.name for field in fields(Counters)]
    return Counters(**{name: sum(getattr(row, name) for row in rows) for name in names})


def memory_figures(device: str) -> dict[str, int]:
    """Bytes of this process now: in host memory, and the device's as CUDA and torch see it."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    figures = {"rss": int(rows["VmRSS"].split()[0]) * 1024}
    figures["rss_anonymous"] = int(rows["RssAnon"].split()[0]) * 1024
    if device != "cpu":
        free, whole = torch.cuda.mem_get_info()
        figures["vram_used"] = whole - free
        figures["vram_allocated"] = torch.cuda.memory_allocated()
        figures["vram_reserved"] = torch.cuda.memory_reserved()
    return figures


def engine_memory(engine: Engine, device: str) -> dict[str, int]:
    """`memory_figures`, and what of it the engine has for what; nothing is left in caches."""
    figures = {"experts": engine.backend.hot_bytes, "pinned": engine.backend.warm_bytes}
    if device != "cpu":
        gpu_backend: Any = engine.backend  # the property is the GPU's
        synchronise(device)
        torch.cuda.empty_cache()
        figures["context"] = gpu_backend.context_bytes
        figures["pinned"] += torch.cuda.host_memory_stats()["allocated_bytes.current"]
    figures |= memory_figures(device)
    for name in ("vram_used", "vram_allocated"):
        if name in figures:
            figures[f"{name}_rest"] = figures[name] - figures["experts"]
    return figures


def occupy(device: str, card: str) -> torch.Tensor | None:
    """Take memory of the GPU until only `card` (`16GiB`) is free: as if it were a smaller one."""
    if device == "cpu" or not card:
        return None
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, free - parse_bytes(card)), dtype=torch.uint8, device=device)
