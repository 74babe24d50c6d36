"""`--vs-fio`: turns, how fio's reads are counted, and what is delivered of a run that is ended."""

import heapq
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.bench.conftest import RecordedSteps, Run

from tierrun.bench import fio, io_fio, io_turns
from tierrun.bench.documents import read_document
from tierrun.bench.ending import delivering
from tierrun.bench.fio import FioResult
from tierrun.bench.io_fio import Agreement, FioTurn
from tierrun.bench.io_load import Load
from tierrun.bench.io_plan import Case
from tierrun.bench.io_sources import Source
from tierrun.bench.io_turns import counted_seconds, load_of_fio, take_turns
from tierrun.bench.yardstick import Turns, alternate, by_rounds
from tierrun.io.errors import TierrunError

FIO = ("io", "--size", "4MiB", "--sizes", "16KiB", "--depths", "2", "--duration", "0.01")
needs_fio = pytest.mark.skipif(fio.obstacle() is not None, reason=str(fio.obstacle()))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    path = tmp_path / "file"
    path.touch()
    return Case((Source(tmp_path, (path,), "a file"),), "direct", "host", "random", 4096, 4)


def load(bandwidth: float) -> Load:
    return Load(bandwidth, bandwidth / 4096, 1.0, 2.0, 3.0)


# -- turns ------------------------------------------------------------------------------------


def called(order: list[str], name: str, value: float) -> Callable[[int], float]:
    return lambda number: (order.append(f"{name}{number}"), value + number)[1]


def test_turns_and_ratios() -> None:
    order = list[str]()
    turns = alternate(called(order, "ours", 10.0), called(order, "fio", 4.0), 3)
    assert order == ["fio0", "ours0", "fio1", "ours1", "fio2", "ours2", "fio3"]
    same: Callable[[float], float] = lambda value: value  # noqa: E731
    assert turns.ratios(same, same) == [10 / 4.5, 11 / 5.5, 12 / 6.5]


def test_turns_by_rounds_are_whole() -> None:
    order = list[str]()
    for number, turns in enumerate(by_rounds(called(order, "o", 1), called(order, "f", 5), 3)):
        assert turns == Turns((1, 2, 3)[: number + 1], (5, 6, 7, 8)[: number + 2])


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1.0, 1.0, 1.0], [1.04, 1.04, 1.03, 1.04], "within 5 %"),
        ([1.0, 1.0, 1.0], [1.1, 1.2, 0.9, 1.1], "within fio's spread"),
        ([1.0, 1.0, 1.0], [1.1, 1.1, 1.1, 1.1], "differs"),
        ([1.2, 1.2, 1.2], [1.1, 1.1, 1.1, 1.1], "differs"),
    ],
)
def test_agreement(ours: list[float], theirs: list[float], verdict: str, case: Case) -> None:
    turns = Turns([load(x) for x in ours], [FioTurn(load(x), 2 * x) for x in theirs])
    found = Agreement(case, 1.0, turns)
    assert found.verdict == verdict and verdict in found.words()
    assert found.own.median == 2 * found.fio.median
    (own,) = [note for note in io_fio.about([found]) if "fio's own figure" in note]
    assert "+100%" in own


# -- counting ---------------------------------------------------------------------------------


def fio_reads(
    service: Callable[[float, int], float], depth: int, seconds: float, warm_up: float
) -> tuple[tuple[float, float], ...]:
    """The reads that fio logs of a drive that ends a read so long after it began: those that end
    after the warm-up; what is in flight at the end is noted when the last of it ends."""
    in_flight = [(service(0.0, number), 0.0) for number in range(depth)]
    heapq.heapify(in_flight)
    done, number = list[tuple[float, float]](), depth
    while (ended := in_flight[0][0]) < warm_up + seconds:
        done.append((in_flight[0][1], ended))
        heapq.heapreplace(in_flight, (service(ended, number), ended))
        number += 1
    drained = max(ended for ended, _ in in_flight)
    done += [(began, drained) for _, began in in_flight]
    return tuple((a - warm_up, b - warm_up) for a, b in done if b > warm_up)


@given(depth=st.integers(1, 64), more=st.floats(3.0, 6.0), ramp=st.floats(1.1, 3.0))
def test_one_after_the_other_or_all_at_once(depth: int, more: float, ramp: float) -> None:
    """A drive of one read per second that serves in order, or shares itself among all: fio's own
    figure is too high by what was in flight, ours is the drive's."""
    seconds, warm_up = more * depth, ramp * depth

    def in_order(began: float, number: int) -> float:
        return float(number + 1)

    def shared(began: float, number: int) -> float:
        return began + depth * (1 if began else (number + 1) / depth)

    for service in (in_order, shared):
        reads = fio_reads(service, depth, seconds, warm_up)
        found = load_of_fio(FioResult(0, 0, 0, 0, 0, 4096, depth, reads))
        assert found.iops == pytest.approx(1, abs=1.5 / (seconds - depth))
        assert found.bandwidth == 4096 * found.iops
        assert found.p50 <= found.p95 <= found.p99


def test_the_own_figure_is_too_high() -> None:
    """The reason for all this."""
    reads = fio_reads(lambda began, number: began + 64, 64, 128, 96)
    assert len(reads) / max(ended for _, ended in reads) > 1.15
    assert load_of_fio(FioResult(0, 0, 0, 0, 0, 1, 64, reads)).iops == pytest.approx(1, rel=0.02)


def test_a_run_without_reads_after_its_warm_up() -> None:
    for reads in ((), ((-2.0, 0.5), (-1.0, 0.5))):
        with pytest.raises(TierrunError, match="--duration"):
            load_of_fio(FioResult(0, 0, 0, 0, 0, 4096, 2, reads))


def test_large_reads_count_for_longer(case: Case) -> None:
    assert counted_seconds(case, 1.0, 1e9) == 1.0
    large = case._replace(nbytes=39_000_000, depth=64)
    assert counted_seconds(large, 1.0, 2e9) == pytest.approx(2 * 64 * 0.039 / 2)


# -- runs -------------------------------------------------------------------------------------


def fast_fio(*arguments: object) -> FioResult:
    reads = tuple((i / 100 - 0.01, i / 100) for i in range(1, 100))
    return FioResult(2e9, 0, 0, 0, 0, 4096, 1, reads)


@pytest.mark.parametrize(
    ("before", "rounds", "said"),
    [
        (1, [], None),
        (2, [1], "told to end after 0 of 2 cells and 1 of 2 rounds of the next"),
        (3, [2], "told to end after 1 of 2 cells"),
        (4, [2, 1], "told to end after 1 of 2 cells and 1 of 2 rounds of the next"),
    ],
)
def test_whole_rounds_outlive_the_end(
    before: int, rounds: list[int], said: str | None, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to end in our turn number `before`, where 0 is the pilot."""
    taken = list[Case]()

    def measure(case: Case, seconds: float, seed: int) -> Load:
        if len(taken) == before:
            raise KeyboardInterrupt
        taken.append(case)
        return load(1e9)

    monkeypatch.setattr(io_turns.fio, "direct_reads", fast_fio)
    cases, found, steps = [case, case._replace(depth=5)], list[Agreement](), RecordedSteps()

    def run() -> None:
        with delivering(found) as ending:
            take_turns(cases, measure, 0.01, 2, steps, found)
        assert isinstance(ending.by, KeyboardInterrupt)

    if said is None:
        with pytest.raises(KeyboardInterrupt):
            run()
        return
    run()
    assert [len(agreement.turns.ours) for agreement in found] == rounds
    assert io_fio.ended_early(found, 2, 2) == said
    assert len(steps.ended) == sum(number == 2 for number in rounds)
    rows = io_fio.sheet_of_agreements(found).rows
    assert len(rows) == len(rounds)


def test_every_cell_is_shown(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_turns.fio, "direct_reads", fast_fio)
    cases, found, steps = [case, case._replace(depth=5)], list[Agreement](), RecordedSteps()
    take_turns(cases, lambda case, seconds, seed: load(1e9), 0.01, 2, steps, found)
    assert [line.partition(",")[0] for line in steps.ended] == ["1 of 2", "2 of 2"]
    assert all("ours 1.00 (1.00–1.00), fio " in line for line in steps.ended)
    assert steps.foreseen == pytest.approx(steps.passed)
    assert sum("round 1 of 2, fio" in text for text in steps.begun) == 4


@needs_fio
def test_fio_logs_its_reads(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    result = fio.direct_reads(path, block_bytes=65536, depth=2, seconds=0.2)
    assert result.reads and all(began < ended for began, ended in result.reads)
    assert max(ended for _, ended in result.reads) < 1.0
    assert load_of_fio(result).p99 > 0


@needs_fio
def test_against_fio_end_to_end(run: Run, tmp_path: Path) -> None:
    directory, file = tmp_path / "drive", tmp_path / "vs.json"
    directory.mkdir()
    code, printed, error = run(
        *FIO, "--nvme-dir", directory, "--vs-fio", "--rounds", 1, "--json", file
    )
    assert code == 0, error
    assert "ours / fio" in printed and "verdict" in printed
    assert "1 of 1, " in error and "GB/s" in error
    readers = {cell.key["reader"]: cell for cell in read_document(file).results.cells}
    assert set(readers) == {"direct", "fio (libaio)"}
    assert len(readers["direct"].samples["p99"]) == 1
    assert len(readers["fio (libaio)"].samples["p99"]) == 2
    (agreement,) = read_document(file).results.details["agreement"]
    assert agreement["verdict"] in {"within 5 %", "within fio's spread", "differs"}
    assert agreement["fio_own"]["median"] > 0 and agreement["rounds"] == 1
    assert list(directory.iterdir()) == []
