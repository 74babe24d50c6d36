"""kvikio behind the reader protocol: the same bytes, named refusals, and a spare for mid-run.

All but the last test use a fake (tests/kvikios.py); native GPUDirect Storage wants nvidia-fs.
"""

import errno
import logging
import mmap
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import FakeReader
from tests.kvikios import CompatMode, FakeDeviceBytes, FakeKvikio

from tierrun.io import gds
from tierrun.io.errors import UsageError
from tierrun.io.extent import PAGE
from tierrun.io.gds import GdsReader, obstacle_to_gds
from tierrun.io.reader import Measured, Reader, choose_reader, open_reader
from tierrun.io.reads import PART_BYTES
from tierrun.io.spare import SparedReader

NUM_PAGES = 23


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    return FakeKvikio().install(monkeypatch)


@pytest.fixture
def no_kvikio(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "kvikio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(np.random.default_rng(3).bytes(NUM_PAGES * PAGE))
    if choose_reader("direct", [path]).fallback:
        pytest.skip("no O_DIRECT on this machine's disk")
    return path


def page_aligned(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))


def with_reader(reader: Reader, work: Callable[[Reader], None]) -> None:
    try:
        work(reader)
    finally:
        reader.close()


# -- bytes ------------------------------------------------------------------------------------

ranges = st.tuples(st.integers(0, NUM_PAGES - 1), st.integers(1, NUM_PAGES)).map(
    lambda t: (t[0] * PAGE, min(t[1], NUM_PAGES - t[0]) * PAGE)
)


@given(wanted=st.lists(ranges, min_size=1, max_size=8))
@settings(max_examples=25)
def test_host_and_device_get_the_bytes_of_the_other_readers(
    wanted: Sequence[tuple[int, int]], kvikio: FakeKvikio, shard: Path
) -> None:
    ours, others = GdsReader([shard], 4), [open_reader(n, [shard], 4) for n in OTHERS]
    for offset, nbytes in wanted:
        found, there = page_aligned(nbytes), FakeDeviceBytes(nbytes)
        ours.read(0, offset, found)
        ours.read_device(0, offset, there)
        assert there.array.tobytes() == found
        for other in others:
            expected = page_aligned(nbytes)
            other.read(0, offset, expected)
            assert found == expected, other.name
    for reader in (ours, *others):
        reader.close()


OTHERS = ("direct", "mmap", "buffered")


def test_each_read_is_one_task_and_settings_are_set(kvikio: FakeKvikio, shard: Path) -> None:
    """A read in several tasks may end, failed, while some of them still write."""

    def read_all(reader: Reader) -> None:
        reader.read(0, 0, page_aligned(NUM_PAGES * PAGE))

    with_reader(GdsReader([shard, shard], 5), read_all)
    assert kvikio.reads == [(0, NUM_PAGES * PAGE, NUM_PAGES * PAGE)]
    assert kvikio.settings == {
        "compat_mode": sys.modules["kvikio"].CompatMode.AUTO,
        "num_threads": 5,
        "task_size": PART_BYTES,
        "bounce_buffer_size": PART_BYTES,
        "gds_threshold": 16 << 10,
        "auto_direct_io_read": True,
    }
    assert kvikio.settings["compat_mode"] is CompatMode.AUTO


def test_threads_are_depth_times_directories(kvikio: FakeKvikio, tmp_path: Path) -> None:
    paths = [tmp_path / name / "shard" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(bytes(PAGE))
    GdsReader(paths, 8).close()
    assert kvikio.settings["num_threads"] == 16


@pytest.mark.parametrize("fails", [True, False])
def test_errors_are_oserrors_that_name_kvikio(fails: bool, kvikio: FakeKvikio, shard: Path) -> None:
    kvikio.fails = lambda offset, size: fails
    reader, offset = GdsReader([shard], 2), (NUM_PAGES - 1) * PAGE
    with pytest.raises(OSError) as caught:
        reader.read_device(0, offset, FakeDeviceBytes(2 * PAGE))
    reader.close()
    assert caught.value.errno == errno.EIO
    assert str(caught.value.strerror).startswith("kvikio: ")
    assert "\n" not in str(caught.value.strerror)


# -- whether it can be used -------------------------------------------------------------------


def test_without_kvikio_the_package_to_install_is_named(no_kvikio: None, shard: Path) -> None:
    choice = choose_reader("gds", [shard])
    assert (choice.name, choice.fallback) == ("direct", True)
    assert "pip install 'tierrun[gds]'" in choice.reason
    with pytest.raises(UsageError, match=r"--io gds: .*pip install 'tierrun\[gds\]'.*--strict"):
        choose_reader("gds", [shard], strict=True)
    with pytest.raises(UsageError, match="pip install"):
        GdsReader([shard], 2)


def test_a_missing_part_of_kvikio_is_named(
    kvikio: FakeKvikio, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    choice = choose_reader("gds", [shard])
    assert choice.name == "direct" and "kvikio" in choice.reason


def test_a_kvikio_that_cannot_read_is_refused_with_its_reason(
    kvikio: FakeKvikio, shard: Path
) -> None:
    """As where there is no libcuda.so.1."""
    kvikio.fails = lambda offset, size: True
    assert "5027" in str(obstacle_to_gds(shard))
    choice = choose_reader("gds", [shard])
    assert (choice.name, choice.fallback) == ("direct", True)
    assert "NVIDIA GPU" in choice.reason
    with pytest.raises(UsageError, match="5027"):
        choose_reader("gds", [shard], strict=True)


def test_native_gds_is_used_as_asked(kvikio: FakeKvikio, shard: Path) -> None:
    choice = choose_reader("gds", [shard], strict=True)
    assert choice == ("gds", "as asked; cuFile with nvidia-fs", False)


@pytest.mark.parametrize(
    ("compat", "reason"), [(True, "kvikio is in its compat"), (False, "nvidia-fs is not loaded")]
)
def test_without_nvidia_fs_kvikio_reads_and_says_so_but_not_strictly(
    compat: bool,
    reason: str,
    kvikio: FakeKvikio,
    shard: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gds, "_NVIDIA_FS", Path("/nowhere"))
    kvikio.compat, kvikio.driver = compat, False
    choice = choose_reader("gds", [shard])
    assert (choice.name, choice.fallback) == ("gds", True)
    assert reason in choice.reason
    with pytest.raises(UsageError, match=reason):
        choose_reader("gds", [shard], strict=True)


def test_a_tmpfs_has_no_gds_either(kvikio: FakeKvikio, memory_directory: Path) -> None:
    shard = memory_directory / "shard"
    shard.write_bytes(bytes(PAGE))
    choice = choose_reader("gds", [shard])
    assert (choice.name, choice.fallback) == ("buffered", True)
    assert "tmpfs" in choice.reason


def test_auto_takes_gds_only_where_it_was_measured_to_be_faster(
    kvikio: FakeKvikio, shard: Path
) -> None:
    assert choose_reader("auto", [shard]).name == "direct"
    for name in ("direct", "gds"):
        measured = Measured(name, "staged", "by these numbers")
        assert choose_reader("auto", [shard], measured=measured) == (name, measured.reason, False)
        assert choose_reader("direct", [shard], measured=measured).name == "direct"


# -- breaking in mid-run ----------------------------------------------------------------------


def test_a_cufile_error_in_mid_run_loses_no_byte_and_is_said_once(
    kvikio: FakeKvikio, shard: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth = shard.read_bytes()

    def read(reader: Reader, page: int) -> None:
        buffer = page_aligned(PAGE)
        reader.read(0, page * PAGE, buffer)
        assert buffer == truth[page * PAGE : (page + 1) * PAGE]

    def work(reader: Reader) -> None:
        read(reader, 0)
        assert reader.name == "gds"
        kvikio.fails = lambda offset, size: True
        with ThreadPoolExecutor(NUM_PAGES) as pool:
            list(pool.map(read, [reader] * NUM_PAGES, range(NUM_PAGES)))
        assert reader.name == "gds, then direct"
        kvikio.fails = lambda offset, size: False
        before = len(kvikio.reads)
        read(reader, 1)
        assert len(kvikio.reads) == before, "direct for the rest of the run"

    with caplog.at_level(logging.WARNING):
        with_reader(open_reader("gds", [shard], 4), work)
    (record,) = caplog.records
    assert "gds failed in mid-run (kvikio: cuFile error" in record.getMessage()
    assert "direct reads from here on" in record.getMessage()


def test_where_the_spare_fails_too_the_drive_is_to_blame(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = [bytes(range(256)) * 16]
    first, spare = FakeReader(images, errno=5), FakeReader(images, errno=121)
    first.failures[0, 0] = spare.failures[0, 0] = 1

    def work(reader: Reader) -> None:
        with pytest.raises(OSError) as caught:
            reader.read(0, 0, page_aligned(PAGE))
        assert caught.value.errno == 121
        reader.read(0, 0, page_aligned(PAGE))
        assert len(first.calls) == 2 and len(spare.calls) == 1

    with_reader(SparedReader(first, spare), work)
    assert first.closed and spare.closed and not caplog.records


# -- the real one -----------------------------------------------------------------------------


def test_kvikio_itself(shard: Path) -> None:
    """Only where there are kvikio and a GPU with its driver."""
    obstacle = obstacle_to_gds(shard)
    if obstacle is not None:
        pytest.skip(obstacle)
    import torch

    truth = shard.read_bytes()
    reader = GdsReader([shard], 4)
    host, device = page_aligned(len(truth)), torch.zeros(len(truth), dtype=torch.uint8).cuda()

    reader.read(0, 0, host)
    reader.read_device(0, 0, device)
    reader.close()
    assert host == truth
    assert device.cpu().numpy().tobytes() == truth
