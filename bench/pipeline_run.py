"""A run of `tierrun bench pipeline`, from a store to results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tierrun.bench.cells import Cell, Metric, Results
from tierrun.bench.devices import measure_bandwidths, say
from tierrun.bench.model_bound import drive_bandwidth
from tierrun.bench.pipeline_load import LOADS, Feeder, Round, WorkingSet
from tierrun.bench.pipeline_tiers import PipelinePath, Sizes, open_path
from tierrun.bench.sheets import Sheet, sheet_of
from tierrun.engine.options import Options
from tierrun.io.extent import format_bytes
from tierrun.io.store import Manifest, Store
from tierrun.tiers.budget import smallest_budget

METRICS = (
    Metric("bandwidth", "GB/s", 1e-9, 2, True),
    Metric("bound", "bound GB/s", 1e-9, 2, True),
    Metric("share_of_bound", "% of bound", 100, 1, True),
    Metric("reads", "reads %", 100, 1, False),
    Metric("copies", "copies %", 100, 1, False),
    Metric("host", "host %", 100, 1, False),
    Metric("hit", "hits %", 100, 1, False),
)

_DRIVE_SECONDS = 0.6
_PASSING = 8
"""Tiers that experts pass through hold one in so many of those that are asked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for; tier sizes None: as usual. `stand_in`: a CPU plays the GPU (tests)."""

    directories: tuple[Path, ...]
    device: torch.device
    options: Options
    nbytes: int = 2 << 30
    vram: int | None = None
    ram: int | None = None
    rounds: int = 5
    seconds: float = 2.0
    stand_in: bool = False

    @property
    def paths(self) -> tuple[PipelinePath, ...]:
        to_device = self.device.type == "cuda" or self.stand_in
        return tuple(PipelinePath) if to_device else (PipelinePath.READ,)

    def sizes(self, manifest: Manifest, working_set: int) -> Sizes:
        """What experts pass through can hold a layer of a token, twice."""
        usual = max(2 * smallest_budget(manifest), working_set // _PASSING)
        return Sizes(self.vram or usual, self.ram or usual, working_set)


def run_pipeline(request: Request) -> tuple[Results, list[Sheet]]:
    """Measure; the results, and how to show them.

    Raises:
        TierrunError: it cannot be measured, or the drive failed; says why.
    """
    store = Store.open(request.directories)
    working_set = WorkingSet.of(store.manifest, request.nbytes)
    sizes = request.sizes(store.manifest, working_set.nbytes)
    copy = measure_bandwidths(str(request.device)).upload if len(request.paths) > 1 else 0.0
    torch.set_num_threads(request.options.num_threads)  # as an engine does
    cells = [
        cell
        for path in request.paths
        for cell in _measure(path, request, store, working_set, sizes, copy)
    ]
    about = {
        "model": store.manifest.model_id or "a model",
        "device": str(request.device),
        "record_bytes": max(c.nbytes for c in store.manifest.classes),
        "working_set_bytes": working_set.nbytes,
        "ram_bytes": sizes.ram,
        "vram_bytes": sizes.vram if len(request.paths) > 1 else 0,
        "io": request.options.io,
        "depth": request.options.depth,
        "rounds": request.rounds,
        "seconds_per_round": request.seconds,
    }
    notes = tuple(_notes(request, working_set, sizes, copy))
    results = Results("pipeline", METRICS, tuple(cells), about, notes)
    return results, [sheet_of(results)]


def _measure(
    path: PipelinePath,
    request: Request,
    store: Store,
    working_set: WorkingSet,
    sizes: Sizes,
    copy: float,
) -> Iterator[Cell]:
    """Both loads on one path, in turns; the drive is measured before each round."""
    say(f"{path}: reads every expert once, unmeasured")
    found: dict[str, list[tuple[Round, float]]] = {load: [] for load in LOADS}
    with open_path(path, store, request.options, sizes, request.device) as tiers:
        feeder = Feeder(tiers, working_set)
        feeder.warm_up()
        for number in range(request.rounds):
            bound = _bound(path, request.directories, copy)
            for load in LOADS:
                done = feeder.run(load, request.seconds)
                found[load].append((done, bound))
                speed = f"{done.bandwidth / 1e9:.2f} of {bound / 1e9:.2f} GB/s"
                say(f"round {number + 1} of {request.rounds}, {path}, {load}: {speed}")
    for load, rounds in found.items():
        yield _cell(path, load, rounds)


def _bound(path: PipelinePath, directories: Sequence[Path], copy: float) -> float:
    """Bytes per second of the slowest part of `path`."""
    if path is PipelinePath.COPY:
        return copy
    drive = drive_bandwidth(directories, _DRIVE_SECONDS)
    return drive if path is PipelinePath.READ else min(drive, copy)


def _cell(path: PipelinePath, load: str, rounds: Sequence[tuple[Round, float]]) -> Cell:
    columns = zip(*(done for done, _ in rounds), strict=True)
    samples = dict(zip(Round._fields, columns, strict=True))
    bounds = tuple(bound for _, bound in rounds)
    shares = tuple(done.bandwidth / bound for done, bound in rounds)
    return Cell(
        {"path": str(path), "load": load}, samples | {"bound": bounds, "share_of_bound": shares}
    )


def _notes(request: Request, working_set: WorkingSet, sizes: Sizes, copy: float) -> Iterator[str]:
    yield (
        f"{format_bytes(working_set.nbytes)} of experts from all layers, each asked for once "
        f"before any is again; RAM holds {format_bytes(sizes.ram)} of them"
        + (f", VRAM {format_bytes(sizes.vram)}" if len(request.paths) > 1 else "")
        + "; hits move no bytes"
    )
    yield (
        "the engine's own tiers and read queue, no arithmetic. decode: a layer's top-k, waited for "
        "before the next layer, nothing read ahead; prefill: all of a layer, read and copied ahead"
    )
    copied = f", copies {copy / 1e9:.1f} GB/s (pinned, large)" if copy else ""
    yield (
        "bound: the slower of drive and copies, measured in this run: random direct reads of the "
        f"same records, before every round{copied}"
    )
    if len(request.paths) > 1:
        yield (
            "decode copies every expert up, as the engine does where the GPU cannot read RAM in "
            "place; where it can, it reads them there over the same bus"
        )
    else:
        yield "no GPU here: the path ends in RAM"
    yield (
        "reads, copies: the share of time in which the host waits for them; host: everything else, "
        "beside which they go on. GB is 10⁹ bytes"
    )
