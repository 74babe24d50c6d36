"""A run of `tierrun bench io`, from directories to results."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tierrun.bench import fio, io_fio
from tierrun.bench.ending import Outcome, delivering
from tierrun.bench.io_bench import (
    Bench,
    about,
    cells_of,
    ended_early,
    measure_all,
    open_sources,
    results_of,
)
from tierrun.bench.io_fio import Agreement, sheet_of_agreements
from tierrun.bench.io_load import Load
from tierrun.bench.io_plan import Plan, choose_cases
from tierrun.bench.io_sources import Source
from tierrun.bench.io_turns import take_turns
from tierrun.bench.running import gpu_asked_for
from tierrun.bench.sheets import sheet_of
from tierrun.bench.steps import Steps, open_steps
from tierrun.io.errors import UsageError
from tierrun.io.extent import format_bytes
from tierrun.tiers.budget import host_memory

if TYPE_CHECKING:
    import torch

_MEMORY_SHARE = 4
"""Buffers take at most one in so many bytes of the free memory."""

_SECONDS_VS_FIO = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for; `file_bytes` None: a usual test file."""

    directories: tuple[Path, ...]
    plan: Plan
    file_bytes: int | None = None
    device: str = "auto"
    vs_fio: bool = False


def run_io(request: Request) -> Outcome:
    """Measure. Who is told to end (Ctrl-C, SIGTERM) still gives what has been measured until then.

    Raises:
        TierrunError: it cannot be measured, or the drive failed; says why.
    """
    if request.vs_fio and fio.obstacle() is not None:
        raise UsageError(f"--vs-fio: {fio.obstacle()}")
    device = gpu_asked_for("cpu" if request.vs_fio else request.device)
    with open_steps() as steps:

        def writing(done: int, whole: int) -> None:
            steps.begin(f"writing a test file: {format_bytes(done)} of {format_bytes(whole)}")

        with open_sources(request.directories, request.file_bytes, writing) as sources:
            run = _against_fio if request.vs_fio else _readers
            return run(request.plan, sources, device, steps)


def _readers(
    plan: Plan, sources: Sequence[Source], device: "torch.device | None", steps: Steps
) -> Outcome:
    targets = ("host",) if device is None else ("host", "device")
    cases = choose_cases(plan, sources, targets, host_memory().free // _MEMORY_SHARE)
    notes = [*about(sources, cases.chosen), *cases.notes()]
    seconds, found = plan.seconds_of(len(cases.chosen)), dict[int, list[Load]]()
    with delivering(found) as ending:
        bench = Bench(cases.chosen, device)
        measure_all(bench, cases.chosen, plan.rounds, seconds, steps, found)
    if ending.by is not None:
        notes.append(ended_early(found, len(cases.chosen), plan.rounds))
    cells = cells_of(cases.chosen, found)
    setting = {"rounds": plan.rounds, "seconds_per_round": seconds}
    results = results_of(cells, sources, setting, notes, {})
    return Outcome(results, [sheet_of(results)], ending.by)


def _against_fio(
    plan: Plan, sources: Sequence[Source], device: "torch.device | None", steps: Steps
) -> Outcome:
    alone = replace(plan, sizes=plan.sizes_of(sources), readers=("direct",))
    files = [source.largest_file() for source in sources]
    cases = choose_cases(alone, files, ("host",), host_memory().free // _MEMORY_SHARE)
    chosen = [case for case in cases.chosen if io_fio.comparable(case)]
    notes = [*about(files, chosen), *cases.notes()]
    seconds, agreements = plan.seconds or _SECONDS_VS_FIO, list[Agreement]()
    with delivering(agreements) as ending:
        bench = Bench(chosen, device)
        take_turns(chosen, bench.measure, seconds, plan.rounds, steps, agreements)
    notes[1:1] = io_fio.about(agreements)
    if ending.by is not None:
        notes.append(io_fio.ended_early(agreements, len(chosen), plan.rounds))
    cells = [cell for agreement in agreements for cell in agreement.cells()]
    setting = {"rounds": plan.rounds, "seconds_per_round": seconds}
    details = {"agreement": [agreement.to_json() for agreement in agreements]}
    results = results_of(cells, sources, setting, notes, details)
    return Outcome(results, [sheet_of_agreements(agreements)], ending.by)
