"""A run of `tierrun bench kernels`, from what was asked for to results.

All cells of a device are measured once per round, in one order, round after round.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tierrun.bench.caches import cache_bytes, more_than_cached
from tierrun.bench.cells import Cell, Results
from tierrun.bench.kernels_bench import METRICS, Found, measure_all, open_bench
from tierrun.bench.kernels_cpu import obstacle
from tierrun.bench.kernels_errors import errors, sheet_of_errors
from tierrun.bench.kernels_plan import (
    CACHE,
    EXPAND,
    FP32,
    INT8,
    MATMUL,
    MATVEC,
    Case,
    Plan,
    largest_record,
)
from tierrun.bench.report import has_gpu_driver, spread
from tierrun.bench.running import check_memory, gpu_asked_for, gpu_errors, status
from tierrun.bench.sheets import Sheet, in_words, sheet_of
from tierrun.bench.words import left_out_notes
from tierrun.io.errors import UsageError

_GPU_BYTES = 1 << 30
"""Of weights in a GPU: far more than its caches have."""

_CACHES = 2
"""As much as so many of the CPU's last-level caches, in host memory."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for; `auto` is the CPU, and a GPU where there is one."""

    plan: Plan
    device: str = "auto"


_Say = Callable[[str], None]


def run_kernels(request: Request) -> tuple[Results, list[Sheet]]:
    """Measure; the results, and how to show them.

    Raises:
        TierrunError: it cannot be measured; says why.
    """
    plan, gpu = request.plan, gpu_asked_for(request.device)
    devices = (() if request.device.startswith("cuda") else ("cpu",)) + (("cuda",) if gpu else ())
    names = {"cpu": "cpu", "cuda": str(gpu)}
    yardsticks, cells, notes = dict[str, Any](), list[Cell](), list[str]()
    with gpu_errors(), status() as say:
        say("compiling kernels")
        cases, left_out = _possible(plan.cases(devices), names)
        seconds = plan.seconds_of(len(cases))
        wrong = list(errors([case for case in cases if case.device == "cpu"]))
        for device in dict.fromkeys(case.device for case in cases):
            mine = [case for case in cases if case.device == device]
            found = _measure(mine, names[device], plan.rounds, seconds, say)
            cells += found.cells
            yardsticks[device] = _described(found)
            notes += _about_yardsticks(device, found)
    notes += [*_about(cells), *_missing(request, devices), *left_out]
    setting = {"rounds": plan.rounds, "seconds_per_round": seconds}
    details = {"yardsticks": yardsticks, "errors": [error._asdict() for error in wrong]}
    results = Results("kernels", METRICS, tuple(cells), setting, tuple(notes), details)
    return results, [sheet_of(results), *([sheet_of_errors(wrong)] if wrong else [])]


def _measure(cases: Sequence[Case], device: str, rounds: int, seconds: float, say: _Say) -> Found:
    def said(number: int, case: Case) -> None:
        say(f"round {number + 1} of {rounds}: {in_words(case.key())}")

    with open_bench(device, _weight_bytes(cases, device)) as bench:
        return measure_all(bench, cases, rounds, seconds, said)


def _weight_bytes(cases: Sequence[Case], device: str) -> int:
    """Of the memory that weights fill.

    Raises:
        UsageError: the host has not so much.
    """
    least = 2 * largest_record(list(cases))
    if device != "cpu":
        return max(_GPU_BYTES, least)
    nbytes = max(more_than_cached(cache_bytes(), _CACHES), least)
    check_memory(nbytes, "smaller --layers")
    return nbytes


# -- what can be measured ---------------------------------------------------------------------


def _possible(cases: Sequence[Case], names: Mapping[str, str]) -> tuple[list[Case], list[str]]:
    """Those of `cases` that there are kernels for, compiled, and why not the others.

    Raises:
        UsageError: none is left.
    """
    cpu, gpu = ([c for c in cases if (c.device == "cpu") == host] for host in (True, False))
    hindrances = {**_without_kernels(cpu), **(_uncompiled(gpu, names["cuda"]) if gpu else {})}
    left = [case for case in cases if case not in hindrances]
    counts = Counter(hindrances.values())
    if not left:
        raise UsageError(f"nothing can be measured: {'; '.join(counts) or 'no device'}")
    return left, list(left_out_notes(counts))


def _uncompiled(cases: Sequence[Case], device: str) -> Mapping[Case, str]:
    """Compile what `cases` need for a GPU; of those that fail, why."""
    from tierrun.bench.kernels_compile import compile_all

    there = {case._replace(device=device): case for case in cases}
    return {there[case]: why for case, why in compile_all(list(there)).items()}


def _without_kernels(cases: Sequence[Case]) -> Mapping[Case, str]:
    """Of the CPU's, those that there are no kernels for, and why."""
    reasons = ((case, obstacle(case)) for case in cases)
    return {case: f"{case.kernel}: {why}" for case, why in reasons if why is not None}


# -- what has to be known ---------------------------------------------------------------------


def _described(found: Found) -> list[dict[str, Any]]:
    """Bytes and FLOP per second of every round."""
    return [
        {"threads": threads, "memory": [y.memory for y in all_], "flops": [y.flops for y in all_]}
        for threads, all_ in found.yardsticks.items()
    ]


def _about_yardsticks(device: str, found: Found) -> Iterator[str]:
    kind = "fp32, 2048³" if device == "cpu" else "bf16, 8192³"
    for threads, all_ in found.yardsticks.items():
        memory, flops = spread([y.memory for y in all_]), spread([y.flops for y in all_])
        who = device if threads is None else f"{device}, threads {threads}"
        yield (
            f"{who}: memory is read at {memory.text(1, 1e-9)} GB/s; torch's product ({kind}) makes "
            f"{flops.text(2, 1e-12)} TFLOP/s; shares are of these, round by round"
        )


def _about(cells: Sequence[Cell]) -> Iterator[str]:
    kernels = {cell.key["kernel"] for cell in cells}
    yield (
        "experts: all products of one layer for so many tokens, each choosing its top-k at random; "
        "GB/s: of packed weights that are needed, each counted once, GB = 10⁹ bytes; from memory: "
        "no call finds its weights in a cache"
    )
    if INT8 in kernels:
        yield (
            f"{INT8}: as the engine computes packed weights; activations rounded to int8 by blocks "
            "of 32, unpacked in registers, for more than 8 tokens in caches"
        )
    if FP32 in kernels:
        yield f"{FP32}: activations in fp32, unpacked in registers"
    if EXPAND in kernels:
        yield (
            f"{EXPAND}: expands to fp32 tile by tile, for torch's products, as the engine does "
            "with --exact, and where there is no int8 kernel"
        )
    if CACHE in {cell.key["from"] for cell in cells}:
        yield f"from {CACHE}: always the same expert, or matrix; shares are of memory all the same"
    if kernels & {MATVEC, MATMUL}:
        yield (
            f"{MATVEC} (up to 8 tokens: every token reads its experts), {MATMUL} (more): recorded "
            "as CUDA graphs, so without the host's time for launching"
        )


def _missing(request: Request, devices: Sequence[str]) -> Iterator[str]:
    if "cuda" not in devices and request.device == "auto" and not has_gpu_driver():
        yield "the CPU's kernels only: the others need a GPU, and there is none here"
