"""`tierrun bench copies`: what is chosen, measured and said; the GPU's part with fakes."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import Experts, tiny_store

from tierrun.bench import copies_device, copies_plan, copies_run, timed
from tierrun.bench.caches import cache_bytes, more_than_cached
from tierrun.bench.copies_bench import Bench, Needs
from tierrun.bench.copies_device import Bus, Pair
from tierrun.bench.copies_engine import Batches
from tierrun.bench.copies_host import HostMemory, copying
from tierrun.bench.copies_plan import (
    DEVICE_TESTS,
    ENGINE,
    ENGINE_TESTS,
    H2D,
    HOST_MEMCPY,
    MEMORY_READ,
    TORCH_LOOP,
    Case,
    Plan,
)
from tierrun.bench.copies_run import Beside, Request, run_copies
from tierrun.bench.io_sizes import ALL, USUAL
from tierrun.bench.report import spread
from tierrun.bench.timed import Work, in_turns, rate
from tierrun.bench.words import num_cores, swept
from tierrun.io.errors import DeviceError, UsageError
from tierrun.tiers.copies import HostCopies
from tierrun.tools import cli

KIB, MIB = 1 << 10, 1 << 20

# -- rates ------------------------------------------------------------------------------------


@given(each=st.floats(1e-6, 10), seconds=st.floats(1e-3, 1), hidden=st.floats(0, 1))
def test_a_rate_is_that_of_the_work(each: float, seconds: float, hidden: float) -> None:
    """Whatever the work takes, and whatever else goes by: not too often, nor too seldom."""
    clock, done = [0.0], list[int]()

    def work(times: int) -> float:
        done.append(times)
        clock[0] += times * each * (1 + hidden)
        return times * each

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed.time, "perf_counter", lambda: clock[0])
        found = rate(work, seconds)
    assert found == pytest.approx(1 / each)
    lasted = done[-1] * each * (1 + hidden)
    assert lasted >= seconds / 2 and (done[-1] == 1 or lasted <= 2.2 * seconds)
    assert done[:2] == [1, 1] and clock[0] <= 3 * lasted + seconds


def test_rounds_go_through_all_cases_in_turn() -> None:
    said, numbers = list[tuple[int, str]](), iter(range(100))
    samples = in_turns(["a", "b"], lambda case: next(numbers), 3, lambda n, c: said.append((n, c)))
    assert samples == [(0, 2, 4), (1, 3, 5)]
    assert said == [(n, case) for n in range(3) for case in "ab"]


# -- what is measured -------------------------------------------------------------------------


def test_sizes_and_tests() -> None:
    usual, full = Plan().cases(MIB, (), True), Plan(full=True).cases(MIB, (), True)
    assert {case.test for case in usual} == set(copies_plan.TESTS)
    assert {case.nbytes for case in usual if case.test == H2D} > {64 * KIB, 256 * MIB, *USUAL}
    assert {case.nbytes for case in full if case.test == H2D} >= {*copies_plan.POWERS, *ALL}
    assert {case.nbytes for case in usual if case.test == ENGINE} == set(USUAL)
    assert Plan().seconds_of(len(usual)) * len(usual) * 5 * 2.5 < 70
    threads = [case.threads for case in usual if case.test == MEMORY_READ]
    assert threads == swept(num_cores())
    assert {c.test for c in Plan().cases(MIB, (), False)} == {MEMORY_READ, HOST_MEMCPY}


def test_the_engine_and_the_loop_take_turns() -> None:
    cases = Plan(tests=ENGINE_TESTS).cases(MIB, (4096,), True)
    assert [case.test for case in cases] == [TORCH_LOOP, ENGINE] * (1 + len(USUAL))
    assert [case.nbytes for case in cases[::2]] == sorted({4096, *USUAL})


def test_what_is_needed_is_there() -> None:
    needs = Needs([Case(HOST_MEMCPY, 3 * MIB, 1), Case(H2D, 2 * MIB), Case(ENGINE, 5000)])
    assert needs.host == 6 * MIB and needs.copied == 4 * MIB and needs.device == 512 * MIB
    assert Needs([Case(MEMORY_READ, MIB, 1)]).device == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"tests": "h2d"}, "--tests h2d: choose from memory_read, "),
        ({"sizes": "1"}, "--sizes 1: a copy has"),
        ({"sizes": "2GiB"}, "--sizes 2GiB"),
        ({"sizes": "big"}, "is not a size"),
        ({"threads": "0"}, "--threads '0': write numbers from 1 to"),
        ({"threads": "1,99999"}, "--threads '99999'"),
        ({"seconds": 0.0}, "--duration 0"),
        ({"seconds": float("nan")}, "--duration nan"),
    ],
)
def test_words_that_are_not_understood(words: dict[str, Any], message: str) -> None:
    asked = dict.fromkeys(("tests", "sizes", "threads", "seconds"), None) | words
    with pytest.raises(UsageError, match=message):
        Plan.of(**asked, full=False, rounds=1)


def test_caches_are_counted_once(tmp_path: Path) -> None:
    for cpu, shared in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        cache = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        cache.mkdir(parents=True)
        (cache / "shared_cpu_list").write_text(f"{shared}\n")
        (cache / "size").write_text("32768K\n")
    assert cache_bytes(tmp_path) == 64 * MIB
    assert cache_bytes(tmp_path / "none") == 0
    assert more_than_cached(0, 4) == 256 * MIB and more_than_cached(300 * MIB, 4) == 1200 * MIB


# -- host memory ------------------------------------------------------------------------------


@given(data=st.data())
def test_memcpy_goes_through_all_places(data: st.DataObject) -> None:
    half = 4096 * data.draw(st.integers(1, 8))
    nbytes = data.draw(st.integers(1, half))
    memory = torch.randint(0, 255, (2 * half,), dtype=torch.uint8)
    source, target = memory[:half].clone(), memory[half:].clone()
    stride = -(-nbytes // 4096) * 4096
    copying(memory, nbytes)(half // stride)
    assert torch.equal(memory[:half], source)
    for place in range(0, half - nbytes + 1, stride):
        target[place : place + nbytes] = source[place : place + nbytes]
    assert torch.equal(memory[half:], target)


def test_reading_sums_up_everything() -> None:
    from tierrun.bench import copies_reading

    memory = torch.zeros(copies_reading.whole_blocks(3 * MIB + 5), dtype=torch.uint8)
    copies_reading.spread_out(memory)
    words = memory.view(torch.int64)
    blocks = 3 * MIB // (256 * KIB)
    assert words.sum().item() == 32768 * sum(range(blocks)) == copies_reading._sum(words.numpy())
    assert rate(copies_reading.reading(memory, 1), 0.001) > 0
    assert HostMemory(MIB).work(Case(MEMORY_READ, MIB, 1))(1) > 0


# -- to and from a device ---------------------------------------------------------------------


@pytest.mark.parametrize("test", [ENGINE, TORCH_LOOP])
@pytest.mark.parametrize("nbytes", [4096, 5000])
def test_batches_copy_records(test: str, nbytes: int) -> None:
    host = torch.randint(0, 255, (64 * 4096,), dtype=torch.uint8)
    inside = torch.zeros_like(host)
    batches = Batches(HostCopies(), host, inside, nbytes)
    assert batches.size == 16
    stride = -(-nbytes // 4096) * 4096
    assert batches.work(test)(64 * 4096 // stride // 16) > 0
    for first in range(0, 64 * 4096 - stride + 1, stride)[: 16 * (64 * 4096 // stride // 16)]:
        assert torch.equal(inside[first : first + nbytes], host[first : first + nbytes])
        assert not inside[first + nbytes : first + stride].any()


class FakeDevice:
    """Streams on which things are noted; a copy takes a second, `late` times the host is slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, late: int = 0) -> None:
        self.log, self.late = list[tuple[str, Any]](), late
        fake, made = self, iter(range(2, 100))

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.cuda_stream = next(made)

            def wait_event(self, event: Any) -> None:
                fake.log.append(("waits", self.cuda_stream))

            def synchronize(self) -> None:
                fake.log.append(("synchronize", self.cuda_stream))

        class Event:
            def __init__(self, enable_timing: bool = False) -> None: ...

            def record(self, stream: Stream) -> None:
                fake.log.append(("event", stream.cuda_stream))

            def query(self) -> bool:
                fake.late -= 1
                return fake.late >= 0

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: "Event") -> float:
                return 1000.0 * fake.counts()[2]

        @contextmanager
        def stream(one: Stream) -> Iterator[None]:
            yield

        monkeypatch.setattr(copies_device, "_Stream", Stream)
        monkeypatch.setattr(copies_device, "_Event", Event)
        monkeypatch.setattr(copies_device, "_sleep", lambda n: self.log.append(("sleep", n)))
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(copies_device, "copy_async", lambda: self.copy)
        self.code = 0

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> int:
        self.log.append(("copy", stream))
        return self.code

    def counts(self) -> dict[int, int]:
        """Copies by stream since the last sleep; the measured stream is 2, the other 3."""
        begun = max(i for i, (what, _) in enumerate(self.log) if what == "sleep")
        streams = [who for what, who in self.log[begun:] if what == "copy"]
        return {stream: streams.count(stream) for stream in (2, 3)}


def pair() -> Pair:
    return torch.zeros(8, dtype=torch.uint8), torch.ones(8, dtype=torch.uint8)


def test_copies_are_enqueued_while_the_device_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDevice(monkeypatch)
    assert Bus(torch.device("cpu")).work(pair(), None)(300) == 300.0
    sleeps = [i for i, (what, _) in enumerate(fake.log) if what == "sleep"]
    assert len(sleeps) == 3 and fake.log[1] == ("event", 2)
    assert [what for what, _ in fake.log].count("copy") == 300
    assert fake.log[129 + 1][0] == "event"


def test_the_other_direction_outlasts_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDevice(monkeypatch)
    assert Bus(torch.device("cpu")).work(pair(), pair())(5) == 5.0
    assert fake.counts() == {2: 5, 3: 10}
    begun = fake.log.index(("event", 2))
    assert fake.log[begun + 1] == ("waits", 3) and fake.log[-1] == ("synchronize", 3)


def test_a_slow_host_makes_the_device_sleep_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDevice(monkeypatch, late=2)
    bus = Bus(torch.device("cpu"))
    assert bus.work(pair(), None)(1) == 1.0
    cycles = [n for what, n in fake.log if what == "sleep"]
    assert cycles == [cycles[0], 2 * cycles[0], 4 * cycles[0]]
    bus.work(pair(), None)(1)
    assert fake.log[-5] == ("sleep", 4 * cycles[0])


def test_a_copy_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDevice(monkeypatch).code = 700
    with pytest.raises(DeviceError, match="a copy of 8 bytes gave error 700"):
        Bus(torch.device("cpu")).work(pair(), None)(1)


def test_every_test_copies_between_other_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that is host memory."""
    FakeDevice(monkeypatch)
    memory = copies_device.DeviceMemory(*torch.zeros(2, 16 * KIB, dtype=torch.uint8))
    seen = dict[str, tuple[Pair, Pair | None]]()
    copies = copies_device.DeviceCopies(torch.device("cpu"), memory, 8 * KIB)
    for test in DEVICE_TESTS:
        monkeypatch.setattr(Bus, "work", lambda self, a, b, t=test: seen.update({t: (a, b)}))
        copies.work(test, 4 * KIB)
    assert len(seen) == 5
    host, inside = (range(part.data_ptr(), part.data_ptr() + 16 * KIB) for part in memory)
    for test, (measured, against) in seen.items():
        target, source = measured
        assert (target.data_ptr() in inside) == (not test.startswith("device_to_host"))
        assert (source.data_ptr() in host) == test.startswith("host_to_device")
        assert (against is not None) == ("bidirectional" in test)
        used = [part.data_ptr() for one in (measured, against) if one for part in one]
        assert len(set(used)) == len(used)


# -- the command ------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`tierrun bench` with some arguments: exit code, stdout, stderr."""
    monkeypatch.setattr(copies_run, "more_than_cached", lambda cache, times: 2 * MIB)

    def bench(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tierrun", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code, printed = ended.value.code, capsys.readouterr()
        return code if isinstance(code, int) else 0, printed.out, printed.err

    return bench


COPIES = ("copies", "--device", "cpu", "--sizes", "64KiB,100000", "--threads", "1")
QUICK = (*COPIES, "--duration", "0.002", "--rounds", "4")


def test_end_to_end(run: Run, tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    files = ("--csv", tmp_path / "t.csv", "--md", tmp_path / "t.md")
    code, printed, error = run(*QUICK, "--json", old, *files)
    assert code == 0, error
    assert "64 KiB" in printed and "0.10 MB" in printed and "GiB is 2³⁰ bytes" in printed
    assert printed.count("need a GPU") == 1
    made = json.loads(old.read_text())
    assert made["benchmark"] == "copies" and made["command"].startswith("tierrun bench copies")
    keys = [tuple(cell["key"].values()) for cell in made["cells"]]
    assert keys == [
        (MEMORY_READ, 2 * MIB, 1),
        (HOST_MEMCPY, 64 * KIB, 1),
        (HOST_MEMCPY, 100000, 1),
    ]
    for cell in made["cells"]:
        pairs = zip(*cell["samples"].values(), strict=True)
        assert all(a * b == pytest.approx(cell["key"]["bytes"]) for a, b in pairs)
    assert (tmp_path / "t.csv").read_text().startswith("test,bytes,threads,bandwidth_median")
    assert "host_memcpy" in (tmp_path / "t.md").read_text()
    code, printed, error = run(*QUICK, "--json", new, "--compare", old)
    assert code == 0 and "verdict" in printed, error
    code, printed, error = run("compare", old, new, "--metric", "seconds")
    assert code == 0 and "µs each: median" in printed, error


def test_a_plot_of_threads_and_sizes(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, error = run(*QUICK, "--plot", tmp_path / "plot.png")
    assert code == 0, error
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_stores_sizes_are_measured_too(run: Run, tmp_path: Path) -> None:
    tiny_store([Experts(num=4, pages=3)], [tmp_path / "store"]).write()
    assert copies_run._record_sizes([tmp_path / "store"]) == (12288,)
    code, _, error = run(*QUICK, "--nvme-dir", tmp_path)
    assert code == 1 and "no store" in error


def test_refusals_are_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> str:
        code, printed, error = run(*QUICK, *arguments)
        assert code in (1, 2) and printed == ""
        assert error.startswith("tierrun: ") and error.count("\n") == 1
        return error

    assert "need a GPU" in refused("--tests", H2D)
    assert "--tests foo" in refused("--tests", "foo")
    assert "no such directory" in refused("--json", tmp_path / "none" / "x.json")
    monkeypatch.setattr(copies_run, "more_than_cached", lambda cache, times: 1 << 50)
    assert "more than half of the" in refused()


def test_with_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run, on a device that is host memory and copies at speeds that are made up."""
    rates = {TORCH_LOOP: [4e9, 5e9, 4e9], ENGINE: [4.9e9, 4.9e9, 1e9]}

    class Fake(Bench):
        def __init__(self) -> None: ...

        def work(self, case: Case) -> tuple[Work, int]:
            speed = rates.get(case.test, [1e9])
            speed.append(speed.pop(0))
            return lambda times: times * case.nbytes / speed[-1], case.nbytes

    @contextmanager
    def opened(needs: Needs, device: torch.device) -> Iterator[Bench]:
        yield Fake()

    monkeypatch.setattr(copies_run, "gpu_asked_for", lambda asked: torch.device("cpu"))
    monkeypatch.setattr(copies_run, "open_bench", opened)
    monkeypatch.setattr(timed, "_MOST_TIMES", 1)
    results, sheets = run_copies(Request(Plan(sizes=(8 * KIB,), rounds=3)))
    assert {cell.key["test"] for cell in results.cells} == set(copies_plan.TESTS)
    assert [row[0] for row in sheets[1].rows] == ["8 KiB"] and sheets[1].rows[0][3] == "0.980"
    (beside,) = results.details["engine"]
    assert beside["median_over_best_of_torch"] == pytest.approx(0.98)
    assert not any("host memory only" in note for note in results.notes)
    assert any("nvbandwidth" in note for note in results.notes)


@pytest.mark.parametrize(("said", "kind"), [("CUDA error: lost\nmore", DeviceError), ("", None)])
def test_a_gpu_that_is_lost_is_one_line(
    monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Exception] | None
) -> None:
    def opened(needs: Needs, device: torch.device) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(copies_run, "open_bench", opened)
    with pytest.raises(kind or RuntimeError) as raised:
        run_copies(Request(Plan(tests=(MEMORY_READ,))))
    assert kind is None or str(raised.value) == "the GPU failed: CUDA error: lost"


def test_too_slow_an_engine_is_marked() -> None:
    def sheet(ours: Sequence[float]) -> str:
        beside = Beside(8192, spread(ours), spread([1.0, 1.1]))
        return next(copies_run._sheets_of([beside])).rows[0][3]

    assert sheet([1.0, 1.2, 1.1]) == "1.000" and sheet([1.06]) == "0.964 <"
