"""What was measured decides, is kept per drive, and is measured again where it is not true."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import Experts, FakeReader, TinyStore, tiny_store

from tierrun.io import drives
from tierrun.io.drives import Drive, drives_of
from tierrun.io.extent import PAGE
from tierrun.io.measuring import (
    HostTrial,
    Plan,
    describe,
    measure,
    places_of,
    record_sizes,
    short_plan,
)
from tierrun.io.profiles import (
    DIRECT,
    GDS,
    GDS_DEVICE,
    STAGED,
    WAYS,
    Cell,
    Profile,
    ProfileFile,
    Setting,
    Way,
    cache_directory,
    choose_paths,
)

SETTING = Setting("nvme.1234", "H100", "26.10.0", "cuFile with nvidia-fs")
DRIVES = (Drive("259:1", "nvme.1234"),)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tierrun" / "drives"


def profile(rates: dict[Way, float], sizes: tuple[int, ...] = (PAGE,)) -> Profile:
    """Bandwidths in GB/s, the same at every depth."""
    cells = [Cell(w, n, d, r * 1e9) for w, r in rates.items() for n in sizes for d in (1, 16)]
    return Profile(SETTING, tuple(cells))


# -- the decision -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gds", "gds_device", "expected"),
    [
        (4.0, 3.0, ("direct", "staged")),
        (6.0, 3.0, ("gds", "staged")),
        (4.0, 6.0, ("direct", "gds")),
        (6.0, 6.0, ("gds", "gds")),
        (5.1, 4.1, ("direct", "staged")),  # no more than measurements differ by
    ],
)
def test_each_destination_takes_the_faster_way(
    gds: float, gds_device: float, expected: tuple[str, str]
) -> None:
    measured = choose_paths(profile({DIRECT: 5.0, GDS: gds, STAGED: 4.0, GDS_DEVICE: gds_device}))
    assert (measured.to_host, measured.to_device) == expected
    for number in ("5.00", "4.00", f"{gds:.2f}", f"{gds_device:.2f}"):
        assert number in measured.reason
    assert "nvidia-fs" in measured.reason


@pytest.mark.parametrize("missing", [(GDS, GDS_DEVICE), (GDS_DEVICE, STAGED), WAYS])
def test_what_was_not_measured_is_not_chosen(missing: tuple[Way, ...]) -> None:
    rates = {DIRECT: 1.0, GDS: 1.0, STAGED: 1.0, GDS_DEVICE: 1.0}
    measured = choose_paths(profile({w: r for w, r in rates.items() if w not in missing}))
    assert (measured.to_host, measured.to_device) == ("direct", "staged")
    assert "was not measured" in measured.reason


def test_sizes_and_depths_count_alike() -> None:
    """Twice as fast at small records, half as fast at large ones: no winner."""
    cells = [Cell(DIRECT, PAGE, 1, 1e9), Cell(DIRECT, 2 * PAGE, 1, 8e9)]
    cells += [Cell(GDS, PAGE, 1, 2e9), Cell(GDS, 2 * PAGE, 1, 4e9)]
    assert choose_paths(Profile(SETTING, tuple(cells))).to_host == "direct"


# -- the file ---------------------------------------------------------------------------------

rates = st.floats(1.0, 1e12, allow_nan=False)
cells = st.builds(Cell, st.sampled_from(WAYS), st.integers(1, 1 << 40), st.integers(1, 64), rates)


@given(found=st.lists(cells, max_size=9))
def test_a_profile_survives_its_file(found: list[Cell]) -> None:
    whole = Profile(SETTING, tuple(found))
    assert Profile.from_json(whole.to_json()) == whole


def test_a_profile_is_kept_per_drive(cache: Path) -> None:
    first, other = ProfileFile(DRIVES), ProfileFile((Drive("259:2", "nvme.5"),))
    assert first.read() is None
    kept = profile(dict.fromkeys(WAYS, 2.0))
    first.write(kept)
    assert first.read() == kept and other.read() is None
    assert [path.name for path in cache.iterdir()] == ["drive-259-1.json"], "no draft is left"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"setting": {}, "cells": []}',
        '{"setting": 3, "cells": []}',
        '{"setting": {"drives": "", "gpu": "", "kvikio": "", "mode": "", "x": ""}, "cells": []}',
    ],
)
def test_a_corrupt_file_is_as_good_as_none(
    text: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    (cache / "drive-259-1.json").write_text(text)
    assert ProfileFile(DRIVES).read() is None
    assert "measuring again" in caplog.text


@pytest.mark.parametrize(
    "cell",
    [
        ["mmap", "host", 1, 1, 1.0],
        ["direct", "host", 0, 1, 1.0],
        ["direct", "host", 1, -1, 1.0],
        ["direct", "host", 1, 1, 0.0],
        ["direct", "host", 1, 1, float("inf")],
        ["direct", "host", 1, 1, float("nan")],
        ["direct", "host", "1", 1, 1.0],
        ["direct", "host", 1, 1],
    ],
)
def test_a_number_out_of_range_is_not_believed(cell: list[object], cache: Path) -> None:
    document = json.loads(Profile(SETTING, ()).to_json()) | {"cells": [cell]}
    cache.mkdir(parents=True)
    (cache / "drive-259-1.json").write_text(json.dumps(document))
    assert ProfileFile(DRIVES).read() is None


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ProfileFile(DRIVES).write(profile({DIRECT: 1.0}))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "every run measures the drive again" in record.getMessage()


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "tierrun" / "drives"


@pytest.mark.parametrize("name", ["drives", "gpu", "kvikio", "mode"])
def test_a_setting_says_what_is_different(name: str) -> None:
    values = {"drives": "a", "gpu": "b", "kvikio": "c", "mode": "d"}
    assert Setting(**values).difference(Setting(**values)) is None
    changed = Setting(**(values | {name: "new"})).difference(Setting(**values))
    assert changed == f"{name} {values[name]!r} then, 'new' now"


def test_new_sizes_join_old_ones() -> None:
    old = profile({DIRECT: 1.0}, sizes=(PAGE, 2 * PAGE))
    fresh = profile({DIRECT: 3.0}, sizes=(2 * PAGE, 3 * PAGE)).cells
    joined = old.joined(fresh)
    assert joined.sizes == {PAGE, 2 * PAGE, 3 * PAGE}
    assert joined.restricted([2 * PAGE]).typical(DIRECT) == pytest.approx(3e9)
    assert joined.restricted([PAGE]).typical(DIRECT) == pytest.approx(1e9)


@pytest.mark.parametrize(
    ("nbytes", "stand_in"),
    [(499, None), (500, 1000), (1000, 1000), (3000, 4000), (8000, 4000), (8001, None)],
)
def test_a_size_stands_in_for_those_within_a_factor_of_two(
    nbytes: int, stand_in: int | None
) -> None:
    measured = profile({DIRECT: 1.0}, sizes=(1000, 4000))
    assert measured.stand_in(nbytes) == stand_in
    assert Profile(SETTING, ()).stand_in(nbytes) is None


# -- drives -----------------------------------------------------------------------------------


def test_directories_of_one_drive_are_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (drive,) = drives_of([tmp_path, tmp_path / "a"])
    device = os.stat(tmp_path).st_dev
    assert drive.number == f"{os.major(device)}:{os.minor(device)}"
    assert drive.identity


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes files of a made-up /sys and /proc, in which `tmp_path` is partition 1 of a drive."""
    device = os.stat(tmp_path).st_dev
    block = tmp_path / "sys"
    (block / "drive" / "partition").mkdir(parents=True)
    (block / f"{os.major(device)}:{os.minor(device)}").symlink_to(block / "drive" / "partition")
    monkeypatch.setattr(drives, "_BLOCK_DEVICES", block)
    monkeypatch.setattr(drives, "_MOUNTS", tmp_path / "mountinfo")

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    return write


def test_a_drive_is_known_by_its_serial_number(
    tmp_path: Path, system: Callable[[str, str], None]
) -> None:
    system("sys/drive/device/serial", "S64A  NX0\n")
    assert drives_of([tmp_path])[0].identity == "S64A NX0"
    system("sys/drive/wwid", "eui.0025\n")
    assert drives_of([tmp_path])[0].identity == "eui.0025"


def test_a_drive_is_known_by_what_is_mounted(
    tmp_path: Path, system: Callable[[str, str], None]
) -> None:
    number = drives_of([tmp_path])[0].number
    assert drives_of([tmp_path])[0].identity == number
    lines = ["1 2 9:9 / / rw - ext4 /dev/other rw", f"1 2 {number} / /x rw a:1 - xfs /dev/md0 rw"]
    system("mountinfo", "\n".join(lines))
    assert drives_of([tmp_path])[0].identity == "xfs /dev/md0"
    system("sys/drive/wwid", "eui.0025\n")
    assert drives_of([tmp_path])[0].identity == "eui.0025 xfs /dev/md0"


# -- measuring --------------------------------------------------------------------------------


def two_sizes() -> TinyStore:
    return tiny_store([Experts(6, 2, pages=1), Experts(3, 1, pages=4), Experts(2, 1, pages=2)])


def test_sizes_and_places_are_the_stores() -> None:
    store = two_sizes().store
    assert record_sizes(store) == (PAGE, 2 * PAGE, 4 * PAGE)
    assert len(set(places_of(store, PAGE))) == 6
    assert {p.offset for p in places_of(store, 4 * PAGE)} == {
        record.offset for record in store.manifest.layers[1].records
    }


def test_every_way_size_and_depth_is_measured_with_whole_records() -> None:
    tiny = two_sizes()
    readers = {way: FakeReader(tiny.images, delay=lambda *a: 0.001) for way in (DIRECT, GDS)}
    trials = {way: HostTrial(reader, 4 * PAGE) for way, reader in readers.items()}
    plan = Plan((PAGE, 4 * PAGE), (1, 3), 0.01)
    cells = measure(tiny.store, trials, plan)
    assert [cell[:3] for cell in cells] == [
        (way, nbytes, depth)
        for way in (DIRECT, GDS)
        for nbytes in (PAGE, 4 * PAGE)
        for depth in (1, 3)
    ]
    assert all(0 < cell.bandwidth < 1e9 for cell in cells)
    assert cells[1].bandwidth > cells[0].bandwidth, "more at once is more"
    for reader in readers.values():
        assert {nbytes for _, _, nbytes in reader.calls} == {PAGE, 4 * PAGE}
        assert max(reader.most_in_flight.values()) == 3
    assert len(list(describe(cells))) == 8


def test_a_way_that_fails_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    tiny = two_sizes()
    broken = FakeReader(tiny.images, failures=EveryPlace())
    trials = {DIRECT: HostTrial(FakeReader(tiny.images), PAGE), GDS: HostTrial(broken, PAGE)}
    cells = measure(tiny.store, trials, Plan((PAGE,), (2,), 0.01))
    assert {cell.way for cell in cells} == {DIRECT}
    assert "gds → RAM could not be measured: injected" in caplog.text
    assert not sum(broken.in_flight.values()), "nothing is under way afterwards"


class EveryPlace(Counter[tuple[int, int]]):
    def __missing__(self, place: tuple[int, int]) -> int:
        return 1


@pytest.mark.parametrize("ways", [1, 4])
def test_a_short_plan_is_short(ways: int) -> None:
    plan = short_plan(two_sizes().store, ways)
    assert plan.sizes == (PAGE, 4 * PAGE), "the ends only"
    assert plan.seconds * ways * len(plan.sizes) * len(plan.depths) <= 3.01
