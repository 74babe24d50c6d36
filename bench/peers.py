"""`tierrun bench peers`: side by side with llama.cpp and accelerate, on the same synthetic weights.

The directory has the model in every form (`tierrun bench store --peers`). Every arm is a fresh
process, with `memory` in a memory cgroup of its own (page cache included), from a cold page cache;
arms take turns. accelerate runs with `device_map="auto"` and the budget as `max_memory`, and, as a
second arm, with a device map made by hand that leaves only the experts on disk; both with
`batched_mm` experts, the fastest of transformers' implementations here. Loading is not counted.

llama-bench feeds independent tokens, and nothing else can be fed to it: with it, every arm gets
such tokens. Without it all get the store's own stream.

(`python -m tierrun.bench.peers` is the same.)
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tierrun.bench.cells import Cell, Metric, Results
from tierrun.bench.devices import say
from tierrun.bench.model_bound import drive_bandwidth
from tierrun.bench.peers_arms import Arm, Killed, Measured, Setting, arms_of
from tierrun.bench.report import run_script
from tierrun.bench.rounds import ROWS, Round, spreads
from tierrun.bench.sheets import Sheet, sheet_of
from tierrun.io.errors import UsageError
from tierrun.io.extent import format_bytes

METRICS = (
    Metric("tokens_per_second", "tok/s", 1, 2, True),
    Metric("peak_bytes", "peak GiB", 2**-30, 2, False),
    Metric("seconds", "whole run s", 1, 1, False),
)

_DRIVE_SECONDS = 0.9


@dataclass(slots=True)
class _Found:
    """By arm and test the samples, by arm why it did not run, and the runs of ours."""

    samples: dict[tuple[str, str], list[Measured]] = field(default_factory=dict)
    killed: dict[str, str] = field(default_factory=dict)
    ours: dict[str, list[Round]] = field(default_factory=dict)


def run_peers(setting: Setting, rounds: int) -> tuple[Results, list[Sheet]]:
    """`rounds` rounds of all arms, alternating; the results, and how to show them.

    Raises:
        TierrunError: an arm cannot be run, or fails otherwise than for want of memory.
    """
    arms, found = arms_of(setting), _Found()
    for number in range(rounds):
        for arm in arms:
            if arm.name not in found.killed:
                say(f"round {number + 1} of {rounds}: {arm.name}")
                _run(arm, setting, found)
    if not found.samples:
        raise UsageError("; ".join(f"{name}: {why}" for name, why in found.killed.items()))
    results = _results(setting, arms, rounds, found)
    return results, [sheet_of(results), *_looks_into(found)]


def _run(arm: Arm, setting: Setting, found: _Found) -> None:
    before = _drive(arm, setting)
    try:
        ran = arm.run(setting)
    except Killed as error:
        say(f"{arm.name}: {error}")
        found.killed[arm.name] = str(error)
        return
    for test, measured in ran.tests.items():
        say(f"{arm.name}, {test}: {measured.tokens_per_second:.2f} tok/s")
        found.samples.setdefault((arm.name, test), []).append(measured)
    if ran.decode is not None and ran.decode.timings and setting.device == "cpu":
        bandwidths = before, _drive(arm, setting)
        done = Round(ran.decode, ran.peak_bytes if setting.memory else 0, bandwidths)
        found.ours.setdefault(arm.name, []).append(done)


def _drive(arm: Arm, setting: Setting) -> float:
    """What the drive gives; nobody asks beside an arm of others."""
    return drive_bandwidth([setting.files.store], _DRIVE_SECONDS) if arm.is_ours else 0.0


def _results(setting: Setting, arms: Sequence[Arm], rounds: int, found: _Found) -> Results:
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
        "commands": {arm.name: arm.command(setting) for arm in arms},
        "tierrun": {
            name: {key: value._asdict() for key, value in spreads(done).items()}
            for name, done in found.ours.items()
        },
    }
    return Results("peers", METRICS, cells, about, tuple(_notes(setting, found)), details)


def _notes(setting: Setting, found: _Found) -> Iterator[str]:
    yield from _ratios(found)
    yield from (f"{name}: {why}" for name, why in found.killed.items())
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


def _ratios(found: _Found) -> Iterator[str]:
    """tierrun over each other arm, of the medians."""
    rates = {
        key: statistics.median(run.tokens_per_second for run in runs)
        for key, runs in found.samples.items()
    }
    for (arm, test), rate in rates.items():
        kind = test[:2]
        ours = [r for (name, other), r in rates.items() if name == "tierrun" and other[:2] == kind]
        if arm != "tierrun" and ours:
            yield f"{kind}: tierrun / {arm}: {ours[0] / rate:.2f}"


def _looks_into(found: _Found) -> Iterator[Sheet]:
    """A column for each arm of ours: where its time goes, and the ledger's bounds."""
    if not found.ours:
        return
    arms = {name: spreads(done) for name, done in found.ours.items()}
    rows = tuple(
        (label, *(arm[figure].text(digits, scale) for arm in arms.values()))
        for label, figure, scale, digits in ROWS
        if any(arm[figure].largest for arm in arms.values())
    )
    yield Sheet("a token of tierrun: median (least–largest)", ("figure", *arms), rows)


def _main() -> None:
    """As a script it is the command."""
    from tierrun.tools.bench_models import bench_peers

    run_script(bench_peers)


if __name__ == "__main__":
    _main()
