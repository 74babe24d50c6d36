"""A run of `tierrun bench copies`, from what was asked for to results.

All cells are measured once per round, in one order, round after round.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tierrun.bench.caches import cache_bytes, more_than_cached
from tierrun.bench.cells import Cell, Results
from tierrun.bench.copies_bench import METRICS, Needs, cell_of, open_bench
from tierrun.bench.copies_plan import (
    DEVICE_TESTS,
    ENGINE,
    ENGINE_TESTS,
    GROUP,
    H2D_PAGEABLE,
    HOST_MEMCPY,
    MEMORY_READ,
    TORCH_LOOP,
    Case,
    Plan,
)
from tierrun.bench.io_sources import stored_sources
from tierrun.bench.report import Spread, has_gpu_driver
from tierrun.bench.running import check_memory, gpu_asked_for, gpu_errors, status
from tierrun.bench.sheets import Sheet, in_words, sheet_of, show
from tierrun.bench.timed import in_turns, rate
from tierrun.io.errors import StoreError, UsageError
from tierrun.io.extent import format_bytes

if TYPE_CHECKING:
    import torch

_READ_TIMES = 4
"""Memory that `memory_read` goes through, in last-level caches."""

AIM = 0.97
"""Of the best of a plain torch loop's rounds: what the engine's copies are to reach."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for; `directories` hold a store whose record sizes are measured, too."""

    plan: Plan
    directories: tuple[Path, ...] = ()
    device: str = "auto"


def run_copies(request: Request) -> tuple[Results, list[Sheet]]:
    """Measure; the results, and how to show them.

    Raises:
        TierrunError: it cannot be measured, or the GPU failed; says why.
    """
    plan, device = request.plan, gpu_asked_for(request.device)
    read_bytes = more_than_cached(cache_bytes(), _READ_TIMES)
    cases = plan.cases(read_bytes, _record_sizes(request.directories), device is not None)
    needs = _checked_needs(cases, plan)
    seconds = plan.seconds_of(len(cases))
    cells = _measure(cases, needs, device, plan.rounds, seconds)
    engine = [Beside.of(*pair) for pair in _pairs(cells)]
    notes = (*_missing(plan, device), *_about(cases))
    setting = {"rounds": plan.rounds, "seconds_per_round": seconds, "numa_nodes": _num_nodes()}
    details = {"engine": [beside.to_json() for beside in engine]}
    results = Results("copies", METRICS, cells, setting, notes, details)
    return results, [sheet_of(results), *_sheets_of(engine)]


def _record_sizes(directories: Sequence[Path]) -> tuple[int, ...]:
    """Of the store in `directories`; none where there are none."""
    sources = stored_sources(directories) if directories else {}
    without = [str(directory) for directory in directories if directory not in sources]
    if without:
        raise StoreError(f"{', '.join(without)}: no store, whose records' sizes could be copied")
    return tuple(sorted({nbytes for source in sources.values() for nbytes in source.records}))


def _checked_needs(cases: Sequence[Case], plan: Plan) -> Needs:
    """Raises UsageError: nothing is left to measure, or there is not the memory for it."""
    if not cases:
        raise UsageError(f"--tests {','.join(plan.tests or ())}: {_no_gpu()}")
    needs = Needs(cases)
    check_memory(needs.in_host, "fewer --tests or smaller --sizes")
    return needs


def _measure(
    cases: Sequence[Case],
    needs: Needs,
    device: "torch.device | None",
    rounds: int,
    seconds: float,
) -> tuple[Cell, ...]:
    with gpu_errors(), status() as say, open_bench(needs, device) as bench:

        def measured(case: Case) -> float:
            work, nbytes = bench.work(case)
            return nbytes * rate(work, seconds)

        def said(number: int, case: Case) -> None:
            say(f"round {number + 1} of {rounds}: {in_words(case.key())}")

        found = in_turns(cases, measured, rounds, said)
    return tuple(cell_of(case, rates) for case, rates in zip(cases, found, strict=True))


# -- the engine beside a plain loop -----------------------------------------------------------


class Beside(NamedTuple):
    """The engine's batches beside torch's loop: bytes per second of the rounds, by record size."""

    nbytes: int
    ours: Spread
    torch: Spread

    @staticmethod
    def of(ours: Cell, theirs: Cell) -> "Beside":
        first = METRICS[0]
        return Beside(int(ours.key["bytes"]), ours.spread(first), theirs.spread(first))

    @property
    def ratio(self) -> float:
        """The engine's median over the loop's best."""
        return self.ours.median / self.torch.largest

    def to_json(self) -> dict[str, float]:
        return {"bytes": self.nbytes, "median_over_best_of_torch": self.ratio}


def _pairs(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """The engine's cell and the loop's, of each size that has both."""
    loops = {c.key["bytes"]: c for c in cells if c.key["test"] == TORCH_LOOP}
    for cell in cells:
        if cell.key["test"] == ENGINE and cell.key["bytes"] in loops:
            yield cell, loops[cell.key["bytes"]]


def _sheets_of(engine: Sequence[Beside]) -> Iterator[Sheet]:
    if engine:
        yield Sheet(
            f"the engine's batches beside a plain torch loop, GB/s; aim: {AIM:.2f}",
            ("bytes", "engine", "torch loop", "median / loop's best"),
            tuple(
                (
                    show("bytes", beside.nbytes),
                    beside.ours.text(2, 1e-9),
                    beside.torch.text(2, 1e-9),
                    f"{beside.ratio:.3f}{'' if beside.ratio >= AIM else ' <'}",
                )
                for beside in engine
            ),
        )


# -- what has to be known ---------------------------------------------------------------------


def _missing(plan: Plan, device: "torch.device | None") -> Iterator[str]:
    if device is None and plan.wants((*DEVICE_TESTS, *ENGINE_TESTS)):
        yield f"host memory only: {_no_gpu()}"


def _no_gpu() -> str:
    why = "there is none here" if not has_gpu_driver() else "--device chooses it"
    return f"copies to and from a device need a GPU, and {why}"


def _about(cases: Sequence[Case]) -> Iterator[str]:
    tests = {case.test for case in cases}
    if MEMORY_READ in tests:
        yield (
            f"{MEMORY_READ}: a sum by so many threads, over {_READ_TIMES} times the last-level "
            f"caches ({format_bytes(cache_bytes())}), within 256 MiB to 4 GiB"
        )
    if _num_nodes() > 1:
        yield f"{_num_nodes()} NUMA nodes: pages are spread as the threads that read them are"
    if HOST_MEMCPY in tests:
        yield (
            f"{HOST_MEMCPY}: libc's, one thread; bytes copied (each is read and written), from and "
            "to places that no cache holds"
        )
    if tests & set(DEVICE_TESTS):
        yield (
            "names are nvbandwidth's where it has the test; its way, too: enqueued before the "
            "first copy begins, timed by events; bidirectional: the direction named first, while "
            "the other goes on; device_local_copy: bytes copied (each is read and written)"
        )
    if H2D_PAGEABLE in tests:
        yield "pageable: torch's blocking copy, by the clock; all other host memory is locked"
    if tests & set(ENGINE_TESTS):
        yield (
            f"{ENGINE}: batches of up to {GROUP} records through tierrun's own copies, as prompts "
            f"copy experts; {TORCH_LOOP}: the same records by a plain loop; both by the clock"
        )
    yield "GB is 10⁹ bytes, MB 10⁶; GiB is 2³⁰ bytes, MiB 2²⁰, KiB 2¹⁰"


_NODES = Path("/sys/devices/system/node")


def _num_nodes() -> int:
    """NUMA nodes of the machine."""
    return max(1, len(list(_NODES.glob("node[0-9]*"))))
