"""A run of `tierrun bench io`, from directories to results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tierrun.bench import fio
from tierrun.bench.cells import Results
from tierrun.bench.io_bench import Bench, about, measure_all, open_sources, results_of
from tierrun.bench.io_fio import against_fio, comparable, sheet_of_agreements
from tierrun.bench.io_plan import Plan, choose_cases
from tierrun.bench.io_sources import Source
from tierrun.bench.running import gpu_asked_for, status
from tierrun.bench.sheets import Sheet, in_words, sheet_of
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


def run_io(request: Request) -> tuple[Results, list[Sheet]]:
    """Measure; the results, and how to show them.

    Raises:
        TierrunError: it cannot be measured, or the drive failed; says why.
    """
    if request.vs_fio and fio.obstacle() is not None:
        raise UsageError(f"--vs-fio: {fio.obstacle()}")
    device = gpu_asked_for("cpu" if request.vs_fio else request.device)
    with status() as say:

        def writing(done: int, whole: int) -> None:
            say(f"writing a test file: {format_bytes(done)} of {format_bytes(whole)}")

        with open_sources(request.directories, request.file_bytes, writing) as sources:
            run = _against_fio if request.vs_fio else _readers
            return run(request.plan, sources, device, say)


_Say = Callable[[str], None]


def _readers(
    plan: Plan, sources: Sequence[Source], device: "torch.device | None", say: _Say
) -> tuple[Results, list[Sheet]]:
    targets = ("host",) if device is None else ("host", "device")
    cases = choose_cases(plan, sources, targets, host_memory().free // _MEMORY_SHARE)
    notes = [*about(sources, cases.chosen), *cases.notes()]
    seconds = plan.seconds_of(len(cases.chosen))
    bench = Bench(cases.chosen, device)
    cells = measure_all(bench, cases.chosen, plan.rounds, seconds, say)
    setting = {"rounds": plan.rounds, "seconds_per_round": seconds}
    results = results_of(cells, sources, setting, notes, {})
    return results, [sheet_of(results)]


def _against_fio(
    plan: Plan, sources: Sequence[Source], device: "torch.device | None", say: _Say
) -> tuple[Results, list[Sheet]]:
    alone = replace(plan, sizes=plan.sizes_of(sources), readers=("direct",))
    files = [source.largest_file() for source in sources]
    cases = choose_cases(alone, files, ("host",), host_memory().free // _MEMORY_SHARE)
    chosen = [case for case in cases.chosen if comparable(case)]
    notes = [*about(files, chosen), *cases.notes()]
    bench, seconds, agreements = Bench(chosen, device), plan.seconds or _SECONDS_VS_FIO, []
    for number, case in enumerate(chosen):
        say(f"{number + 1} of {len(chosen)}, in turns with fio: {in_words(case.key())}")
        agreements.append(against_fio(case, bench.measure, seconds, plan.rounds))
    cells = [cell for agreement in agreements for cell in agreement.cells()]
    setting = {"rounds": plan.rounds, "seconds_per_round": seconds}
    details = {"agreement": [agreement.to_json() for agreement in agreements]}
    return results_of(cells, sources, setting, notes, details), [sheet_of_agreements(agreements)]
