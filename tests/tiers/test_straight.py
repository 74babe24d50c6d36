"""Records into device memory, past the warm tier: whole, checked, and by name where not."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import FOREVER, Experts, TinyStore, tiny_store

from tierrun.io.errors import CorruptError, ReadError
from tierrun.io.extent import PAGE
from tierrun.io.store import ExpertKey
from tierrun.tiers import staging, straight
from tierrun.tiers.staging import BounceBuffers, DeviceReader, SparedDeviceReader, StagedReader
from tierrun.tiers.straight import StraightReads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _parts_of_two_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (staging, straight):
        monkeypatch.setattr(module, "PART_BYTES", 2 * PAGE)


class FakeDeviceReader:
    """A `DeviceReader` over bytes in memory; failures and flips as in `FakeReader`."""

    def __init__(self, tiny: TinyStore, name: str = "fake") -> None:
        self.name, self._images, self._lock = name, tiny.images, Lock()
        self.failures: Counter[tuple[int, int]] = Counter()
        self.flips: Counter[tuple[int, int]] = Counter()
        self.calls: list[tuple[int, int, int]] = []

    def read_device(self, shard: int, offset: int, into: torch.Tensor) -> None:
        with self._lock:
            self.calls.append((shard, offset, into.nbytes))
            if self.failures[shard, offset] > 0:
                self.failures[shard, offset] -= 1
                raise OSError(5, "injected")
            into.numpy()[:] = memoryview(self._images[shard])[offset : offset + into.nbytes]
            if self.flips[shard, offset] > 0:
                self.flips[shard, offset] -= 1
                into[7] ^= 1


@contextmanager
def reads(tiny: TinyStore, reader: DeviceReader) -> Iterator[StraightReads]:
    found = StraightReads(tiny.store, reader, BounceBuffers(CPU, 3), 4, lambda: None)
    try:
        yield found
    finally:
        found.close()


def memory(tiny: TinyStore, key: ExpertKey) -> torch.Tensor:
    return torch.zeros(len(tiny.record(key)), dtype=torch.uint8)


def place(tiny: TinyStore, key: ExpertKey, page: int = 0) -> tuple[int, int]:
    record, _ = tiny.store.locate(key)
    return record.shard, record.offset + page * PAGE


LARGE = [Experts(4, 2, pages=5), Experts(4, 2, pages=1)]
KEY = ExpertKey(0, 2)


@given(experts=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=8))
@settings(max_examples=20)
def test_records_are_the_stores(experts: list[tuple[int, int]], tmp_path: Path) -> None:
    """Any of them, all at once, also the same one twice; from a disk."""
    tiny = tiny_store(LARGE, [tmp_path / "a", tmp_path / "b"])
    store = tiny.write()
    buffers = BounceBuffers(CPU, 3)
    staged = StagedReader(store.shard_paths, buffers, os.O_DIRECT)
    found = StraightReads(store, staged, buffers, 3, staged.close)
    keys = [ExpertKey(*expert) for expert in experts]
    targets = [memory(tiny, key) for key in keys]
    futures = [found.submit(key, into) for key, into in zip(keys, targets, strict=True)]
    for key, into, future in zip(keys, targets, futures, strict=True):
        future.result(20)
        assert into.numpy().tobytes() == tiny.record(key)
    found.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_records_reach_a_gpu_whole(tmp_path: Path) -> None:
    """More records than threads, so that every pinned buffer is used again and again."""
    tiny = tiny_store([Experts(24, 2, pages=5)], [tmp_path / "a", tmp_path / "b"])
    store, device = tiny.write(), torch.device("cuda")
    buffers = BounceBuffers(device, 3)
    staged = StagedReader(store.shard_paths, buffers, os.O_DIRECT)
    found = StraightReads(store, staged, buffers, 3, staged.close)
    keys = [ExpertKey(0, expert) for expert in range(24)]
    targets = [memory(tiny, key).to(device) for key in keys]
    torch.cuda.synchronize()
    futures = [found.submit(key, into) for key, into in zip(keys, targets, strict=True)]
    for key, into, future in zip(keys, targets, futures, strict=True):
        future.result(20)
        assert into.cpu().numpy().tobytes() == tiny.record(key)
    found.close()


def test_records_are_read_in_parts() -> None:
    tiny = tiny_store(LARGE)
    reader = FakeDeviceReader(tiny)
    with reads(tiny, reader) as found:
        found.submit(KEY, memory(tiny, KEY)).result(20)
    shard, offset = place(tiny, KEY)
    parts = [(0, 2 * PAGE), (2 * PAGE, 2 * PAGE), (4 * PAGE, PAGE)]
    assert sorted(reader.calls) == [(shard, offset + start, n) for start, n in parts]


def test_a_failed_part_is_tried_once_more() -> None:
    tiny = tiny_store(LARGE)
    reader = FakeDeviceReader(tiny)
    reader.failures[place(tiny, KEY, 2)] = 1
    with reads(tiny, reader) as found:
        into = memory(tiny, KEY)
        found.submit(KEY, into).result(20)
        assert into.numpy().tobytes() == tiny.record(KEY)


def test_a_part_that_fails_twice_is_named_and_the_others_have_ended() -> None:
    tiny = tiny_store(LARGE)
    reader = FakeDeviceReader(tiny)
    reader.failures[place(tiny, KEY, 2)] = 2
    with reads(tiny, reader) as found:
        future = found.submit(KEY, memory(tiny, KEY))
        error = future.exception(20)
        assert isinstance(error, ReadError)
        assert (error.layer, error.expert, error.errno) == (*KEY, 5)
        calls = len(reader.calls)
        found.submit(KEY, memory(tiny, KEY)).result(20)
    assert calls <= 4, "and no part was read after"


@pytest.mark.parametrize("page", [0, 2, 4])
def test_checksums_are_compared_at_the_first_read(page: int) -> None:
    tiny = tiny_store(LARGE)
    reader = FakeDeviceReader(tiny)
    reader.flips[place(tiny, KEY, page)] = 1
    with reads(tiny, reader) as found:
        into = memory(tiny, KEY)
        found.submit(KEY, into).result(20)
        assert into.numpy().tobytes() == tiny.record(KEY)
        assert reader.calls[-1] == (*place(tiny, KEY), 5 * PAGE), "read once more, whole"
        calls = len(reader.calls)
        found.submit(KEY, into).result(20)
        assert len(reader.calls) == calls + 3


def test_a_record_that_differs_twice_is_corrupt() -> None:
    tiny = tiny_store(LARGE)
    reader = FakeDeviceReader(tiny)
    reader.flips[place(tiny, KEY)] = FOREVER
    with reads(tiny, reader) as found:
        for _ in range(2):
            error = found.submit(KEY, memory(tiny, KEY)).exception(20)
            assert isinstance(error, CorruptError)
            assert "layer 0, expert 2" in str(error)


def test_closing_waits_for_what_is_under_way() -> None:
    tiny = tiny_store(LARGE)
    closed: list[bool] = []
    found = StraightReads(
        tiny.store, FakeDeviceReader(tiny), BounceBuffers(CPU, 3), 2, lambda: done()
    )
    futures = [found.submit(ExpertKey(0, e), memory(tiny, KEY)) for e in range(4)]

    def done() -> None:
        closed.extend(future.done() for future in futures)

    found.close()
    assert closed == [True] * 4


def test_a_device_reader_that_breaks_has_a_spare(caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_store(LARGE)
    first, spare = FakeDeviceReader(tiny, "gds"), FakeDeviceReader(tiny, "staged")
    reader = SparedDeviceReader(first, spare)
    for expert in range(4):
        for page in (0, 2, 4):
            first.failures[place(tiny, ExpertKey(0, expert), page)] = FOREVER
    with reads(tiny, reader) as found:
        targets = [memory(tiny, KEY) for _ in range(4)]
        futures = [found.submit(ExpertKey(0, e), into) for e, into in enumerate(targets)]
        for expert, future in enumerate(futures):
            future.result(20)
            assert targets[expert].numpy().tobytes() == tiny.record(ExpertKey(0, expert))
        assert found.reader_name == "gds, then staged"
        calls = len(first.calls)
        found.submit(KEY, targets[0]).result(20)
        assert len(first.calls) == calls
    (record,) = caplog.records
    assert "gds failed in mid-run (injected): staged reads from here on" in record.getMessage()


def test_where_both_fail_the_error_is_the_spares() -> None:
    tiny = tiny_store(LARGE)
    first, spare = FakeDeviceReader(tiny), FakeDeviceReader(tiny)
    first.failures[place(tiny, KEY)] = spare.failures[place(tiny, KEY)] = 1
    reader = SparedDeviceReader(first, spare)
    with pytest.raises(OSError, match="injected"):
        reader.read_device(*place(tiny, KEY), memory(tiny, KEY))
    reader.read_device(*place(tiny, KEY), memory(tiny, KEY))
    assert len(first.calls) == 2 and len(spare.calls) == 1


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    tiny = tiny_store(LARGE, [tmp_path])
    store = tiny.write()
    buffers = BounceBuffers(CPU, 3)
    staged = StagedReader(store.shard_paths, buffers, 0)
    os.truncate(store.shard_paths[0], PAGE)
    with pytest.raises(OSError, match="ends at byte"):
        staged.read_device(*place(tiny, KEY), memory(tiny, KEY))
    staged.close()
