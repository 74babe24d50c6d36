"""A run of `tierrun bench model`, from a store and a plan to results."""

import gc
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tierrun.bench import devices
from tierrun.bench.cells import Cell, Metric, Results
from tierrun.bench.devices import Setting, say
from tierrun.bench.ending import Outcome, delivering
from tierrun.bench.model_bench import Figures, Runner, Told, forget_usage, usage_curve
from tierrun.bench.model_bound import Rates, drive_bandwidth, measure_rates
from tierrun.bench.model_plan import Budgets, Case, Plan
from tierrun.bench.sheets import Sheet, split_keys
from tierrun.bench.stream import routing_of
from tierrun.engine.architecture import read_config
from tierrun.engine.engine import Engine
from tierrun.io.errors import BudgetError, UsageError
from tierrun.io.extent import format_bytes
from tierrun.io.store import MODEL_DIR, Manifest, read_manifest
from tierrun.tiers.budget import resolve_ram, resolve_vram

METRICS = (
    Metric("tokens_per_second", "tok/s", 1, 2, True),
    Metric("hot", "hot %", 100, 1, True),
    Metric("warm", "warm %", 100, 1, True),
    Metric("cold", "cold %", 100, 1, False),
    Metric("read_bytes", "read GB/tok", 1e-9, 3, False),
    Metric("bus_bytes", "bus GB/tok", 1e-9, 3, False),
    Metric("bound", "bound tok/s", 1, 1, True),
    Metric("share_of_bound", "% of bound", 100, 1, True),
)
"""In the order of `Figures`."""

_DRIVE_SECONDS = 1.0
CURVE = tuple(float(percent) for percent in range(101))


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for; the budgets in `setting` are replaced by the plan's."""

    directories: tuple[Path, ...]
    plan: Plan
    setting: Setting


@dataclass(slots=True)
class _Found:
    """What is known so far."""

    cells: list[Cell] = field(default_factory=list)
    by: list[str] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    tiers: dict[str, dict[str, int]] = field(default_factory=dict)
    rates: list[Rates] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    routing: str = ""
    ended: BaseException | None = None


def run_model(request: Request) -> Outcome:
    """Measure. Who is told to end (Ctrl-C, SIGTERM) still gives what has been measured until then.

    Raises:
        TierrunError: it cannot be measured, or the drive failed; says why.
    """
    manifest, found = read_manifest(request.directories[0]), _Found()
    _check(request, manifest)
    with delivering(found.cells) as ending:
        _measure_all(request, found)
    found.ended = ending.by
    if not found.cells:
        raise UsageError("; ".join(found.left_out))
    results = _results(request, manifest, found)
    return Outcome(results, [sheet_of(results, request.setting.device)], found.ended)


def _measure_all(request: Request, found: _Found) -> None:
    machine = measure_rates(request.setting.device, 0.0)  # now: engines change torch's threads
    for budgets in request.plan.budgets:
        say(f"--vram {budgets.vram} --ram {budgets.ram}")
        rates = machine._replace(drive=drive_bandwidth(request.directories, _DRIVE_SECONDS))
        found.rates.append(rates)
        try:
            _measure(request, budgets, rates, found)
        except BudgetError as error:
            found.left_out[f"--vram {budgets.vram} --ram {budgets.ram}: {error}"] += 1
        _let_go(request.setting.device)


def _check(request: Request, manifest: Manifest) -> None:
    """Before anything slow.

    Raises:
        UsageError: a budget that is not understood, or a test that its context does not hold.
    """
    for vram, ram in request.plan.budgets:
        resolve_ram(devices.budget(ram, manifest), 0)
        resolve_vram(devices.budget(vram, manifest), request.setting.device)
    config = read_config(request.directories[0] / MODEL_DIR)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and request.plan.context > longest:
        tests = ", ".join(test.name for test in request.plan.tests if test.end > longest)
        raise UsageError(f"{tests or '--learn'}: this model's context ends at {longest}")


def _measure(request: Request, budgets: Budgets, rates: Rates, found: _Found) -> None:
    """All tests under one pair of budgets.

    Raises:
        BudgetError: it does not fit.
    """
    setting = replace(request.setting, vram=budgets.vram, ram=budgets.ram)
    setting = replace(setting, context=setting.context or request.plan.context)
    with setting.load(*request.directories) as engine:
        try:
            _run_all(engine, request, budgets, rates, found)
        finally:
            forget_usage(engine)


def _run_all(
    engine: Engine, request: Request, budgets: Budgets, rates: Rates, found: _Found
) -> None:
    plan, name = request.plan, " / ".join(budgets)
    runner = Runner(engine, request.setting.device, plan)
    found.routing = routing_of(engine.model.config)
    runner.learn()
    for test in plan.tests:
        told = [runner.told(done, rates) for done in runner.run(test)]
        stats = engine.stats()
        found.tiers[name] = {
            "hot_bytes": stats.hot_bytes,
            "warm_bytes": stats.warm_bytes,
            "resident_bytes": stats.resident_bytes,
            "chunk": engine.backend.chunk,
        }
        found.curves[name] = usage_curve(engine, CURVE)
        found.cells.append(_cell(test, budgets, told))
        found.by.append(statistics.mode(each.by for each in told))


def _cell(test: Case, budgets: Budgets, told: Sequence[Told]) -> Cell:
    columns = zip(Figures._fields, zip(*(each.figures for each in told), strict=True), strict=True)
    return Cell({**budgets._asdict(), "test": test.name}, dict(columns))


def _let_go(device: str) -> None:
    """What an engine leaves to the garbage collector, and torch keeps of the device."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _results(request: Request, manifest: Manifest, found: _Found) -> Results:
    setting = request.setting
    where = "cpu" if setting.device == "cpu" else torch.cuda.get_device_name(setting.device)
    about: dict[str, Any] = {
        "model": manifest.model_id or "a model",
        "size_bytes": manifest.expert_bytes + manifest.resident_bytes,
        "expert_bytes": manifest.expert_bytes,
        "device": where,
        "routing": found.routing,
        "repetitions": request.plan.repetitions,
        "learnt_tokens": request.plan.learn,
        "io": setting.io,
        "policy": setting.policy,
        "lanes": setting.lanes,
        "threads": setting.threads,
    }
    details = {
        "bound_by": found.by,
        "rates": [rates._asdict() for rates in found.rates],
        "tiers": found.tiers,
        "usage_percents": list(CURVE),
        "usage_curves": found.curves,
    }
    return Results("model", METRICS, tuple(found.cells), about, (*_notes(request, found),), details)


def _notes(request: Request, found: _Found) -> list[str]:
    memory, upload, drive, flops = (
        statistics.median(column) for column in zip(*found.rates, strict=True)
    )
    measured = [f"memory {memory / 1e9:.1f} GB/s", f"drive {drive / 1e9:.2f} GB/s"]
    if request.setting.device != "cpu":
        measured.insert(1, f"bus {upload / 1e9:.1f} GB/s")
    plan = request.plan
    learnt = f"{plan.learn} tokens decoded and one repetition of each test before"
    return [
        "bound: the time that the bytes alone would take, on the slowest way: weights read from "
        "the computing memory, experts over the bus, records from the drive, or the products; at "
        f"what was measured in this run: {', '.join(measured)}, {flops / 1e12:.2f} TFLOP/s "
        "(torch's product). `by` says which it is. What was read and copied is what this run read "
        "and copied",
        f"warm-up: {learnt if plan.warm else 'none'}; tokens are those of the fixed stream "
        f"(routing {found.routing}), each repetition the next ones",
        "hot, warm, cold: lookups served by VRAM (or --vram of memory), by RAM, and by a read",
        "GB is 10⁹ bytes, GiB 2³⁰; GB/tok: bytes per token",
        *(f"left out: {reason}" for reason in found.left_out),
        *(["told to end before all was measured: tests are missing"] if found.ended else []),
    ]


def sheet_of(results: Results, device: str) -> Sheet:
    """llama-bench's table: a row per test, mean ± standard deviation of the repetitions; medians of
    everything else. What is the same in all rows, and what only a GPU has, stands in no column."""
    about, on_gpu = results.setting, device != "cpu"
    names, common = split_keys([cell.key for cell in results.cells])
    columns = [*(name for name in names if name != "test"), "test"]
    chosen = [m for m in results.metrics[1:] if on_gpu or m.name not in ("hot", "bus_bytes")]
    rows = tuple(
        (
            *(_shown(results, cell, name) for name in columns),
            mean_and_deviation(cell.samples["tokens_per_second"]),
            *(f"{cell.spread(m).median * m.scale:,.{m.digits}f}" for m in chosen),
            by,
        )
        for cell, by in zip(results.cells, results.details["bound_by"], strict=True)
    )
    same = [f"--{n} {_shown(results, results.cells[0], n)}" for n in common if n != "test"]
    title = ", ".join(
        [f"{about['model']} ({format_bytes(int(about['size_bytes']))}) on {about['device']}", *same]
    )
    title += f": mean ± standard deviation of {about['repetitions']} repetitions, else medians"
    return Sheet(title, (*columns, "tok/s", *(m.label for m in chosen), "by"), rows)


def _shown(results: Results, cell: Cell, name: str) -> str:
    """A value of a key; of a budget also what came of it, where it is not a plain number."""
    text = str(cell.key[name])
    if name == "test" or (text[:1].isdecimal() and "%" not in text):
        return text
    tier = results.details["tiers"][f"{cell.key['vram']} / {cell.key['ram']}"]
    return f"{text} ({format_bytes(tier['hot_bytes' if name == 'vram' else 'warm_bytes'])})"


def mean_and_deviation(samples: Sequence[float]) -> str:
    """`12.34 ± 0.56`, as llama-bench has it: the deviation of the sample."""
    deviation = statistics.stdev(samples) if len(samples) > 1 else 0.0
    return f"{statistics.fmean(samples):.2f} ± {deviation:.2f}"


def device_of(asked: str) -> str:
    """`cpu`, or the GPU's name for torch.

    Raises:
        UsageError: no such device here.
    """
    from tierrun.bench.report import has_gpu_driver
    from tierrun.engine.devices import choose_device

    if asked == "auto" and not has_gpu_driver():
        return "cpu"
    return str(choose_device(asked).device)
