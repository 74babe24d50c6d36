"""`tierrun bench io` on tiny files: what is chosen, measured and said, and what is refused."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bench.conftest import RecordedSteps, Run, refused
from tests.fakes import Experts, tiny_store
from tests.kvikios import CompatMode, FakeKvikio

from tierrun.bench import fio, io_bench, io_plan, io_readers
from tierrun.bench.documents import read_document
from tierrun.bench.ending import delivering
from tierrun.bench.io_bench import (
    Bench,
    about,
    cells_of,
    ended_early,
    measure_all,
    open_sources,
)
from tierrun.bench.io_load import Load, run_load
from tierrun.bench.io_plan import Case, Plan, choose_cases
from tierrun.bench.io_readers import HostBuffers, open_to_device, open_to_host
from tierrun.bench.io_sizes import ALL, RECORDS, USUAL
from tierrun.bench.io_sources import Source
from tierrun.io.errors import TierrunError, UsageError
from tierrun.io.extent import PAGE
from tierrun.io.measuring import Place
from tierrun.io.reader import choose_reader
from tierrun.tools.arguments import normalise

MIB = 1 << 20
QUICK = Plan(sizes=(4 * PAGE,), depths=(2,), readers=("buffered",), rounds=2, seconds=0.01)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """One file of 2 MiB."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2 * MIB))
    return Source(tmp_path, (path,), "a file")


def needs_direct(path: Path) -> None:
    if choose_reader("direct", [path]).fallback:
        pytest.skip("no O_DIRECT on this machine's disk")


def chosen(plan: Plan, *sources: Source, memory: int = 1 << 40) -> list[Case]:
    return choose_cases(plan, sources, ("host",), memory).chosen


# -- sizes and cases --------------------------------------------------------------------------


def test_sizes_are_those_of_real_models() -> None:
    assert list(ALL) == sorted(ALL) and set(USUAL) < set(ALL)
    assert 0.25e6 < ALL[0] < 0.35e6 and 37e6 < ALL[-1] < 40e6
    assert all(nbytes % PAGE == 0 for nbytes in ALL)
    assert max(b / a for a, b in zip(ALL, ALL[1:], strict=False)) <= 3.1
    assert len({record.model for record in RECORDS}) >= 6


def test_everything_or_a_subset(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "num_places", lambda self, nbytes: 10**6)
    monkeypatch.setattr(io_plan, "obstacle", lambda reader, path: None)
    usual, full = chosen(Plan(), source), chosen(Plan(full=True), source)
    assert {case.depth for case in full} == {1, 2, 4, 8, 16, 32, 64}
    assert {case.nbytes for case in full} == set(ALL)
    assert {case.pattern for case in full} == {"random", "sequential"}
    assert {case.pattern for case in usual} == {"random"}
    assert {case.key().values() and tuple(case.key().values()) for case in usual} < {
        tuple(case.key().values()) for case in full
    }
    seconds = Plan().seconds_of(len(usual)) * Plan().rounds * len(usual)
    assert seconds < 120
    assert max(case.in_flight for case in usual) <= 512 * MIB < max(c.in_flight for c in full)


def test_a_stores_own_sizes_come_first(source: Source) -> None:
    store = replace(source, records={3 * PAGE: (Place(0, 0),)})
    assert Plan().sizes_of([store]) == (3 * PAGE, *USUAL)
    assert Plan(sizes=(PAGE,)).sizes_of([store]) == (PAGE,)


def test_directories_alone_and_together(source: Source, tmp_path: Path) -> None:
    other = replace(source, directory=tmp_path / "other")
    cases = chosen(QUICK, source, other)
    names = [case.key()["directory"] for case in cases]
    assert names == [str(tmp_path), f"{tmp_path}/other", f"{tmp_path} + {tmp_path}/other"]
    assert [case.lanes for case in cases] == [2, 2, 4]
    loads = [Bench(cases, None).measure(case, 0.01, 0) for case in cases]
    assert all(load.bandwidth > 0 for load in loads)


def test_the_shards_of_a_group_are_counted_through(tmp_path: Path) -> None:
    """Every lane of two directories with two files each reads its own directory's files."""
    sources = []
    for name in "ab":
        paths = tuple(tmp_path / f"{name}{i}" for i in range(2))
        for path in paths:
            path.write_bytes(os.urandom(8 * PAGE))
        sources.append(Source(tmp_path / name, paths, name))
    case = Case(tuple(sources), "buffered", "host", "random", PAGE, 1)
    streams = Bench([case], None)._streams(case, lambda lane, place: None, 0)
    shards = [{place.shard for place in stream} for stream in streams]
    assert shards == [{0, 1}, {2, 3}]


def test_what_cannot_be_measured_is_said(source: Source) -> None:
    with pytest.raises(UsageError, match="fewer than 3 records for each read in flight"):
        chosen(replace(QUICK, depths=(1000,)), source)
    with pytest.raises(UsageError, match="quarter of the free memory"):
        chosen(QUICK, source, memory=PAGE)
    found = choose_cases(replace(QUICK, depths=(2, 1000)), [source], ("host",), 1 << 40)
    assert len(found.chosen) == 1
    assert list(found.notes())[0].startswith("left out (1 cell): fewer than 3 records")


def test_direct_io_refused_is_said(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_readers, "direct_obstacle", lambda path: "O_DIRECT is refused (why)")
    plan = replace(QUICK, readers=("direct", "buffered"))
    found = choose_cases(plan, [source], ("host",), 1 << 40)
    assert [case.reader for case in found.chosen] == ["buffered"]
    assert "O_DIRECT is refused (why)" in " ".join(found.notes())


def test_memory_is_not_a_drive(memory_directory: Path) -> None:
    with open_sources([memory_directory], MIB, lambda done, whole: None) as sources:
        found = choose_cases(Plan(sizes=(PAGE,), depths=(2,)), sources, ("host",), 1 << 40)
        assert {case.reader for case in found.chosen} == {"mmap-warm", "buffered"}
        text = " ".join([*about(sources, found.chosen), *found.notes()])
    assert "is a tmpfs: this measures memory" in text
    assert "there is no direct I/O" in text and "dropped" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sizes": "1.8XB"}, "is not a size"),
        ({"sizes": "0"}, "--sizes 0"),
        ({"depths": "0"}, "--depths '0'"),
        ({"depths": "4,"}, "--depths ''"),
        ({"readers": "direct,ftp"}, "--readers ftp: choose from direct, mmap, "),
        ({"pattern": "zigzag"}, "--pattern zigzag: choose from random, sequential, both"),
        ({"seconds": 0.0}, "--duration 0"),
    ],
)
def test_words_that_are_not_understood(words: dict[str, Any], message: str) -> None:
    asked = dict.fromkeys(("sizes", "depths", "readers", "pattern", "seconds"), None) | words
    with pytest.raises(UsageError, match=message):
        Plan.of(**asked, full=False, rounds=1)


def test_words_that_are_understood() -> None:
    plan = Plan.of("1.8MB,8MiB,1", "1,4,4", "direct,mmap-warm", "both", False, 3, 0.5)
    assert plan.sizes == (440 * PAGE, 8 * MIB, PAGE)
    assert plan.depths == (1, 4)
    assert plan.patterns == ("random", "sequential")
    assert plan.seconds_of(1000) == 0.5


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["direct", "mmap", "mmap-warm", "buffered"])
def test_every_reader_gets_the_bytes(reader: str, source: Source) -> None:
    needs_direct(source.paths[0])
    nbytes, buffers = 4 * PAGE, HostBuffers(HostBuffers.needed(4 * PAGE, 3)).lanes(4 * PAGE, 3)
    data = source.paths[0].read_bytes()
    with open_to_host(reader, source.paths, buffers) as read:
        for lane, place in enumerate(source.places(nbytes, shuffled=True, seed=0)[:3]):
            read(lane, place)
            assert bytes(buffers[lane]) == data[place.offset : place.offset + nbytes]


@pytest.mark.parametrize("reader", ["kvikio-compat", "kvikio-gds"])
def test_kvikio_in_either_mode(
    reader: str, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_direct(source.paths[0])
    kvikio = FakeKvikio().install(monkeypatch)
    assert io_readers.obstacle(reader, source.paths[0]) is None
    buffers = HostBuffers(HostBuffers.needed(PAGE, 1)).lanes(PAGE, 1)
    with open_to_host(reader, source.paths, buffers) as read:
        wanted = CompatMode.ON if reader == "kvikio-compat" else CompatMode.AUTO
        assert kvikio.settings["compat_mode"] is wanted
        read(0, Place(0, PAGE))
    assert bytes(buffers[0]) == source.paths[0].read_bytes()[PAGE : 2 * PAGE]


def test_gds_without_nvidia_fs_is_left_out(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_direct(source.paths[0])
    FakeKvikio(driver=False).install(monkeypatch)
    found = io_readers.obstacle("kvikio-gds", source.paths[0])
    assert found is not None and "compatibility mode" in found
    assert io_readers.obstacle("kvikio-compat", source.paths[0]) is None


def test_into_a_device_through_pinned_memory(source: Source) -> None:
    """With the CPU as the device, the same steps without the copy's hardware."""
    needs_direct(source.paths[0])
    nbytes, device = 1 << 20, torch.device("cpu")
    with open_to_device("direct", source.paths, nbytes, 2, device) as read:
        load = run_load(read, [iter([Place(0, 0)] * 9)] * 2, nbytes, 0.0)
    assert load.bandwidth > 0


def test_buffers_begin_in_huge_pages() -> None:
    import ctypes

    buffers = HostBuffers(HostBuffers.needed(3 * MIB, 2)).lanes(3 * MIB, 2)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers]
    assert all(address % (2 * MIB) == 0 for address in addresses)
    assert addresses[1] - addresses[0] == 4 * MIB


def test_cells_have_a_sample_of_each_round(source: Source) -> None:
    needs_direct(source.paths[0])
    plan = replace(QUICK, readers=("direct", "mmap", "mmap-warm", "buffered"), depths=(1, 2))
    cases, steps, found = chosen(plan, source), RecordedSteps(), dict[int, list[Load]]()
    measure_all(Bench(cases, None), cases, 2, 0.01, steps, found)
    cells = cells_of(cases, found)
    assert len(cells) == 8 and len(steps.ended) == 16
    assert steps.ended[0].startswith("round 1 of 2, 1 of 8: ")
    assert steps.ended[8].startswith("round 2 of 2, 1 of 8: ") and "GB/s" in steps.ended[8]
    assert steps.foreseen == pytest.approx(steps.passed)
    for cell in cells:
        assert {len(values) for values in cell.samples.values()} == {2}
        pairs = zip(cell.samples["bandwidth"], cell.samples["iops"], strict=True)
        assert all(rate == pytest.approx(iops * 4 * PAGE) for rate, iops in pairs)
        assert all(a <= b for a, b in zip(*[cell.samples[n] for n in ("p50", "p99")], strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [0, 2, 4])
def test_what_was_measured_outlives_the_end(
    before: int, error: type[BaseException], source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three cells and two rounds; with nothing there is nothing to deliver."""
    cases, found = chosen(replace(QUICK, depths=(1, 2, 3)), source), dict[int, list[Load]]()
    numbers = itertools.count()

    def measure(self: Bench, case: Case, seconds: float, seed: int) -> Load:
        if next(numbers) == before:
            raise error
        return Load(*range(1, 6))

    monkeypatch.setattr(Bench, "measure", measure)
    expected = pytest.raises(error) if not before else contextlib.nullcontext()
    with expected, delivering(found) as ending:
        measure_all(Bench(cases, None), cases, 2, 0.01, RecordedSteps(), found)
    if not before:
        return
    assert isinstance(ending.by, error)
    rounds = [len(cell.samples["p99"]) for cell in cells_of(cases, found)]
    assert rounds == {2: [1, 1], 4: [2, 1, 1]}[before]
    said = ended_early(found, 3, 2)
    assert said.startswith(f"told to end after {before} of 6 measurements")
    assert said.endswith("1 of 3 cells are missing") == (before == 2)


@pytest.mark.parametrize("reader", ["direct", "mmap", "buffered"])
def test_a_file_that_ends_in_mid_run(reader: str, source: Source) -> None:
    """As a drive that goes away: the read is named, and nothing hangs."""
    needs_direct(source.paths[0])
    (case,) = chosen(replace(QUICK, readers=(reader,)), source)
    bench, real = Bench([case], None), io_bench.drop

    def drop_and_truncate(paths: Sequence[Path]) -> None:
        real(paths)
        os.truncate(source.paths[0], 5 * PAGE)

    places = source.places(case.nbytes, shuffled=True, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "places", lambda self, nbytes, **how: places)
        patch.setattr(io_bench, "drop", drop_and_truncate)
        with pytest.raises(TierrunError, match=rf"a read of {4 * PAGE} bytes by {reader} failed"):
            bench.measure(case, 5.0, 0)


def test_a_drive_that_is_gone(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(fd: int, offset: int, into: memoryview) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(io_readers, "read_fully", gone)
    (case,) = chosen(QUICK, source)
    with pytest.raises(TierrunError, match=r"No such device.*is the drive still there"):
        Bench([case], None).measure(case, 5.0, 0)


def test_a_file_that_others_map_is_not_cold(source: Source) -> None:
    import mmap

    with source.paths[0].open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        assert sum(mapping[::PAGE]) > 0
        text = " ".join(about([source], []))
    assert "100% of a file stays in the page cache" in text


# -- the command ------------------------------------------------------------------------------

IO = ("io", "--size", "4MiB", "--sizes", "16KiB", "--depths", "2", "--duration", "0.01")


def test_end_to_end(run: Run, tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    directory = tmp_path / "drive"
    directory.mkdir()
    ours = (*IO, "--nvme-dir", directory, "--readers", "buffered,mmap-warm")
    code, printed, error = run(*ours, "--json", old, "--csv", tmp_path / "t.csv")
    assert code == 0, error
    assert "buffered" in printed and "it measures memory, not the drive" in printed
    assert list(directory.iterdir()) == []
    made = json.loads(old.read_text())
    assert made["command"].startswith("tierrun bench io --size 4MiB")
    assert {cell["key"]["reader"] for cell in made["cells"]} == {"buffered", "mmap-warm"}
    assert all(len(cell["samples"]["p99"]) == 5 for cell in made["cells"])
    code, printed, error = run(*ours, "--json", new, "--compare", old)
    assert code == 0, error
    assert "verdict" in printed and "Mann-Whitney" in printed
    code, printed, error = run("compare", old, new, "--metric", "p50")
    assert code == 0 and "p50 ms: median" in printed
    assert "another machine" not in printed


def test_a_store_is_only_read(run: Run, tmp_path: Path) -> None:
    tiny_store([Experts(num=64, pages=4)], [tmp_path / "store"]).write()
    before = {path: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    directory = ("--nvme-dir", tmp_path / "store")
    code, printed, error = run("io", *directory, "--depths", 2, "--duration", 0.01, "--rounds", 1)
    assert code == 0, error
    assert "the store of tiny/store" in printed and "16 KiB" in printed
    assert {path: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before


def test_refusals_are_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ("--nvme-dir", tmp_path)
    assert "--readers foo" in refused(run, *IO, *here, "--readers", "foo")
    assert "no such directory" in refused(run, *IO, "--nvme-dir", tmp_path / "none")
    assert "once" in refused(run, *IO, *here, *here)
    assert "was asked for" in refused(run, "io", *here, "--size", "900TiB")
    assert "too small" in refused(run, *IO, *here, "--sizes", "3MiB")
    assert "cannot be read" in refused(run, *IO, *here, "--compare", tmp_path / "none.json")
    monkeypatch.delenv("TIERRUN_NVME_DIR", raising=False)
    assert "--nvme-dir" in refused(run, *IO)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "fio is not installed" in refused(run, *IO, *here, "--vs-fio")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(fio.obstacle() is not None, reason=str(fio.obstacle()))
def test_against_fio_end_to_end(run: Run, tmp_path: Path) -> None:
    directory, file = tmp_path / "drive", tmp_path / "vs.json"
    directory.mkdir()
    code, printed, error = run(
        *IO, "--nvme-dir", directory, "--vs-fio", "--rounds", 1, "--json", file
    )
    assert code == 0, error
    assert "ours / fio" in printed and "verdict" in printed
    readers = {cell.key["reader"]: cell for cell in read_document(file).results.cells}
    assert set(readers) == {"direct", "fio (libaio)"}
    assert len(readers["direct"].samples["p99"]) == 1
    assert len(readers["fio (libaio)"].samples["p99"]) == 2
    (agreement,) = read_document(file).results.details["agreement"]
    assert agreement["verdict"] in {"within 5 %", "within fio's spread", "differs"}
    assert list(directory.iterdir()) == []


def test_options_may_stand_before_the_command() -> None:
    commands: dict[str, Sequence[str]] = {"bench": ("io",), "run": (), "ls": ()}
    before = normalise(["--nvme-dir", "ls", "bench", "io", "--full"], commands, {"--nvme-dir"})
    assert before == ["bench", "io", "--nvme-dir", "ls", "--full"]
    assert normalise(["bench", "--help"], commands, set()) == ["bench", "--help"]
    assert normalise(["ls", "io"], commands, set()) == ["ls", "io"]
    assert normalise(["-p", "bench"], commands, {"-p"}) == ["run", "-p", "bench"]


@pytest.mark.parametrize(
    "command",
    [
        *("", "--help", "bench", "bench --help", "bench io --help"),
        *(
            "bench store --help",
            "bench model --help",
            "bench pipeline --help",
            "bench peers --help",
        ),
    ],
)
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from tierrun.tools import cli\n"
        f"sys.argv = ['tierrun', *{command.split()}]\n"
        "try: cli.main()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert found.stdout.splitlines()[-1] == "set()", found.stderr
    assert "Usage" in found.stdout and found.stderr == ""
