"""What `tierrun bench peers` found, as results: samples, ratios, and what must be said of them."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tierrun.bench.cells import Cell, Metric, Results
from tierrun.bench.peers_arms import Arm
from tierrun.bench.peers_drive import measured_by
from tierrun.bench.peers_runs import Measured
from tierrun.bench.peers_setting import Setting
from tierrun.bench.rounds import Round, spreads
from tierrun.io.extent import format_bytes

METRICS = (
    Metric("tokens_per_second", "tok/s", 1, 2, True),
    Metric("peak_bytes", "peak GiB", 2**-30, 2, False),
    Metric("seconds", "whole run s", 1, 1, False),
)

_BUSY_CORES = 0.1
"""Of others, above which a run was disturbed: threads wait for the slowest of them."""


@dataclass(slots=True)
class Found:
    """By arm and test the samples, by arm why it did not run, what its program says of itself, and
    the cores that others kept busy beside each run; the runs of ours; what ended all early."""

    samples: dict[tuple[str, str], list[Measured]] = field(default_factory=dict)
    killed: dict[str, str] = field(default_factory=dict)
    about: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    others: dict[str, list[float]] = field(default_factory=dict)
    ours: dict[str, list[Round]] = field(default_factory=dict)
    ended: BaseException | None = None


def results_of(found: Found, setting: Setting, arms: Sequence[Arm], rounds: int) -> Results:
    """Of at least one sample."""
    cells = tuple(
        Cell(
            {"arm": arm, "test": test},
            {m.name: tuple(float(getattr(x, m.name)) for x in runs) for m in METRICS},
        )
        for (arm, test), runs in found.samples.items()
    )
    about: dict[str, Any] = {
        "directory": str(setting.directory),
        "memory_bytes": setting.memory or 0,
        "ram": setting.ram,
        "vram": setting.vram,
        "device": setting.device,
        "threads": setting.threads,
        "routing": setting.stream,
        "warmup_tokens": setting.warmup,
        "rounds": rounds,
    }
    details = {
        "killed": found.killed,
        "ratios": {f"{test}: {pair}": ratio for test, pair, ratio in ratios(found)},
        "commands": {arm.name: arm.command(setting) for arm in arms},
        "programs": {name: dict(said) for name, said in found.about.items()},
        "others_cores": found.others,
        "drive_measured_by": measured_by(),
        "tierrun": {
            name: {key: value._asdict() for key, value in spreads(done).items()}
            for name, done in found.ours.items()
        },
    }
    return Results("peers", METRICS, cells, about, tuple(_notes(setting, found)), details)


def ratios(found: Found) -> Iterator[tuple[str, str, float]]:
    """Of each test, each arm of ours over each of the others', of the medians."""
    rates = {
        key: statistics.median(run.tokens_per_second for run in runs)
        for key, runs in found.samples.items()
    }
    for (arm, test), rate in rates.items():
        for (mine, other), speed in rates.items():
            if _is_ours(mine) and not _is_ours(arm) and other[:2] == test[:2]:
                yield test[:2], f"{mine} / {arm}", speed / rate


def _is_ours(arm: str) -> bool:
    return arm.startswith("tierrun")


def _notes(setting: Setting, found: Found) -> Iterator[str]:
    yield from (f"{test}: {pair}: {ratio:.2f}" for test, pair, ratio in ratios(found))
    yield from (f"{name}: {why}" for name, why in found.killed.items())
    if found.ended is not None:
        yield "told to end before all was measured: rounds are missing"
    yield from _disturbed(found)
    cap = "without a memory cap"
    if setting.memory is not None:
        cap = f"in a memory cgroup of {format_bytes(setting.memory)}, page cache included"
    yield (
        f"every arm a process of its own, {cap}, in turns; {setting.cold}; budget --ram "
        f"{setting.ram}"
    )
    kind = "independent, as llama-bench's are" if setting.llama_bench else "the store's own stream"
    yield f"tokens: {kind} (routing {setting.stream}); tierrun decodes {setting.warmup} before tg"
    threads = setting.threads or "each program's own default"
    yield f"threads: {threads}. GiB is 2³⁰ bytes, of the whole cgroup where there is one, else RSS"
    yield f"drive: {measured_by()}, before and after each run of tierrun"


def _disturbed(found: Found) -> Iterator[str]:
    busy = {name: max(runs) for name, runs in found.others.items()}
    worst = {name: cores for name, cores in busy.items() if cores > _BUSY_CORES}
    if worst:
        told = ", ".join(f"{name} {cores:.2f}" for name, cores in worst.items())
        yield f"not a quiet machine: other programs kept cores busy beside these arms: {told}"
