"""Experts that VRAM lacks and RAM has: how fast both lanes serve them, together and each alone.

    python -m tierrun.bench.gpu_lanes STORE --vram 1%experts

One engine; the modes take turns, so that nothing else differs. *Misses alone*: layers one after
the other are asked for top-k experts of which VRAM has none, through recorded graphs as in decode,
but with nothing between the layers' experts; bytes of their records by seconds. *Decode*: the fixed
stream of tokens, little in VRAM.
"""

import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.table import Table

from tierrun.bench import devices
from tierrun.bench.devices import Setting, say, synchronise
from tierrun.bench.report import Spread, document, emit, open_console, run_script, spread
from tierrun.bench.stream import token_stream
from tierrun.engine.engine import Engine
from tierrun.engine.gpu.graphs import SegmentedGraph
from tierrun.io.errors import TierrunError
from tierrun.tiers.lanes import LANES
from tierrun.tiers.tier import NOBODY

PROMPT = 1024


class Sample(NamedTuple):
    """One turn of one mode: what it served by seconds, and how the CPU shared in it."""

    bytes_per_second: float
    cpu_share: float


class Misses:
    """Layers that find nothing in VRAM and everything in RAM."""

    def __init__(self, engine: Engine, device: str) -> None:
        self._engine, self._device = engine, device
        backend: Any = engine.backend  # only a GPU's has these
        self._vram, self._hook = backend.vram, backend.hook
        self._warm = backend.residency.placement
        self._random = np.random.default_rng(0)
        self._lanes = backend.lanes
        hidden_size = engine.model.config.get_text_config().hidden_size
        self._hidden = torch.randn(1, hidden_size, device=device)
        layers = engine.store.manifest.layers
        self._chosen = [
            torch.zeros(1, described.top_k, dtype=torch.int64, device=device)
            for described in layers
        ]
        for layer, chosen in enumerate(self._chosen):
            chosen.copy_(torch.tensor([self._in_ram_only(layer, chosen.numel())]))
        self._graph = self._record()

    @staticmethod
    def bring(engine: Engine) -> None:
        """Have RAM hold what it can of every layer: prompts of random weights ask deep layers for
        few experts."""
        backend: Any = engine.backend
        for layer, described in enumerate(engine.store.manifest.layers):
            for first in range(0, len(described.records), described.top_k):
                few = range(first, min(first + described.top_k, len(described.records)))
                lease = backend.residency.lease(layer, list(few))
                for _ in lease.arrivals():
                    pass
                lease.release()
        backend.vram.publish()

    def sample(self, mode: str, steps: int) -> Sample:
        """`steps` passes over all layers."""
        self._lanes.mode = mode
        before = self._engine.ledger.snapshot()
        seconds = sum(self._pass() for _ in range(steps))
        counters = self._engine.ledger.snapshot() - before
        served = counters.zero_copy_bytes + counters.computed_bytes
        return Sample(served / seconds, counters.computed_bytes / max(1, served))

    def _pass(self) -> float:
        """Seconds for all layers, one after the other, of experts that are in RAM only."""
        for layer, chosen in enumerate(self._chosen):
            chosen.copy_(torch.tensor([self._in_ram_only(layer, chosen.numel())]))
        self._hook.start_forward()
        synchronise(self._device)
        started = time.perf_counter()
        self._graph.replay()
        synchronise(self._device)
        seconds = time.perf_counter() - started
        self._hook.end_forward(1)
        return seconds

    def _in_ram_only(self, layer: int, count: int) -> list[int]:
        first, last = self._warm.first[layer : layer + 2].tolist()
        absent = np.flatnonzero(self._vram.slots.slot_of[first:last] == NOBODY)
        held = [int(expert) for expert in absent if first + int(expert) in self._warm.homes]
        if len(held) < count:
            raise TierrunError(f"layer {layer}: RAM alone holds {len(held)} experts; more --ram")
        picked: list[int] = self._random.choice(held, count, replace=False).tolist()
        return picked

    def _record(self) -> SegmentedGraph:
        """The experts of all layers and nothing else, recorded after a first pass."""
        graph = SegmentedGraph()
        self._run_layers()
        self._hook.cut = graph.cut
        try:
            graph.record(self._run_layers)
        finally:
            self._hook.cut = None
        return graph

    def _run_layers(self) -> torch.Tensor:
        for layer, chosen in enumerate(self._chosen):
            found: torch.Tensor = self._hook(layer, self._hidden, chosen)
        return found


def decode_speed(engine: Engine, mode: str, stream: list[int], position: int, count: int) -> float:
    """Tokens per second over `count` tokens of `stream` from `position` on."""
    backend: Any = engine.backend
    backend.lanes.mode = mode
    fixed = stream[position : position + count + 1]
    records = engine.generate(
        stream[position - PROMPT : position], len(fixed), fixed=fixed, ignore_eos=True
    )
    seconds = [record.figures.seconds for record in records][2:]
    return len(seconds) / sum(seconds)


def measure(engine: Engine, device: str, rounds: int, steps: int, tokens: int) -> dict[str, Any]:
    """Every mode in turn, `rounds` times; spreads by mode."""
    vocabulary = engine.model.config.get_text_config().vocab_size
    stream = token_stream(PROMPT * 2 + rounds * tokens + 2, vocabulary)
    engine.session().prefill(stream[:PROMPT])
    Misses.bring(engine)
    misses = Misses(engine, device)
    samples: dict[str, list[Sample]] = {mode: [] for mode in LANES}
    speeds: dict[str, list[float]] = {mode: [] for mode in LANES}
    for mode in LANES:
        misses.sample(mode, 1)
    for number in range(rounds):
        for mode in LANES:
            samples[mode].append(misses.sample(mode, steps))
            place = PROMPT + number * tokens
            speeds[mode].append(decode_speed(engine, mode, stream, place, tokens))
    return {
        mode: {
            "bytes_per_second": spread([s.bytes_per_second for s in samples[mode]])._asdict(),
            "cpu_share": spread([s.cpu_share for s in samples[mode]])._asdict(),
            "tokens_per_second": spread(speeds[mode])._asdict(),
        }
        for mode in LANES
    }


def table(found: dict[str, Any], title: str) -> Table:
    """One row per mode."""
    made = Table(title=title)
    for name in ("lanes", "misses alone, GB/s", "by the CPU, %", "decode, tok/s"):
        made.add_column(name, justify="left" if name == "lanes" else "right")
    for mode, row in found.items():
        made.add_row(
            "both" if mode == "auto" else mode,
            Spread(**row["bytes_per_second"]).text(1, 1e-9),
            Spread(**row["cpu_share"]).text(0, 100),
            Spread(**row["tokens_per_second"]).text(1),
        )
    return made


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    device: devices.Device = "cuda",
    vram: devices.VramBudget = "1%experts",
    ram: devices.RamBudget = "auto",
    io: devices.Io = "auto",
    threads: devices.Threads = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every mode.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Passes over all layers per turn.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Decoded per turn.")] = 32,
    json_file: devices.JsonFile = None,
) -> None:
    """Measure the GPU reading in place, the CPU, and both."""
    devices.check_device(device)
    setting = Setting(
        device, vram, ram, context=2 * PROMPT, ubatch=PROMPT, io=io, threads=threads, lanes="auto"
    )
    with setting.load(store) as engine:
        lanes = getattr(engine.backend, "lanes", None)
        if lanes is None:
            raise TierrunError("this engine has no CPU lane; see what it says when it loads")
        found = measure(engine, device, rounds, steps, tokens)
        costs = lanes.text()
    best = max(found[mode]["bytes_per_second"]["median"] for mode in ("gpu", "cpu"))
    ratio = found["auto"]["bytes_per_second"]["median"] / best
    open_console().print(table(found, f"{store.name}, {vram} in VRAM"))
    say(f"both lanes are {ratio:.2f} x the better one alone; fitted: {costs}")
    document_ = {"modes": found, "ratio": ratio, "costs": costs, "vram": vram}
    emit(document("gpu_lanes", document_), json_file)


if __name__ == "__main__":
    run_script(main)
