"""Every reader gives the same bytes, and the choice between them has a reason."""

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kvikios import FakeKvikio

from tierrun.io.errors import UsageError
from tierrun.io.extent import PAGE, Extent
from tierrun.io.reader import READERS, Reader, choose_reader, open_reader

NUM_PAGES = (37, 5)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two files of random pages on disk."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"shard{i}" for i in range(len(NUM_PAGES))]
    for path, pages in zip(paths, NUM_PAGES, strict=True):
        path.write_bytes(generator.bytes(pages * PAGE))
    return paths


@pytest.fixture(params=[*READERS, "gds through a fake"])
def name(
    request: pytest.FixtureRequest, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> str:
    """Each reader that works on this machine, and kvikio's where only a fake of it does."""
    name, _, through = request.param.partition(" ")
    if through:
        FakeKvikio().install(monkeypatch)
    choice = choose_reader(name, shards)
    if choice.name != name:
        pytest.skip(f"no {name} reads here: {choice.reason}")
    return str(name)


def page_aligned(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))


def with_reader(
    name: str, paths: Sequence[Path], work: Callable[[Reader], None], depth: int = 4
) -> None:
    reader = open_reader(name, paths, depth)
    try:
        work(reader)
    finally:
        reader.close()


def at_once(calls: Sequence[Callable[[], None]]) -> None:
    """Each on a thread of its own; an error of one is raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for call in [pool.submit(call) for call in calls]:
            call.result()


extents = st.tuples(st.integers(0, 1), st.integers(0, 36), st.integers(1, 37)).map(
    lambda t: (t[0], Extent(t[1] % NUM_PAGES[t[0]] * PAGE, t[2] * PAGE))
)


@given(wanted=st.lists(extents, min_size=1, max_size=12))
@settings(max_examples=25)
def test_readers_fill_a_range_with_its_bytes_or_fail(
    wanted: list[tuple[int, Extent]], name: str, shards: list[Path]
) -> None:
    """Any page-aligned ranges, all at once; a range past the end is an error, not a short read."""
    contents = [path.read_bytes() for path in shards]

    def one(reader: Reader, shard: int, extent: Extent) -> None:
        buffer = page_aligned(extent.nbytes)
        truth = contents[shard][extent.offset : extent.end]
        if len(truth) == extent.nbytes:
            reader.read(shard, extent.offset, buffer)
            assert buffer == truth
        else:
            with pytest.raises(OSError) as caught:
                reader.read(shard, extent.offset, buffer)
            assert caught.value.errno == errno.EIO

    def all_at_once(reader: Reader) -> None:
        at_once([partial(one, reader, shard, extent) for shard, extent in wanted])

    with_reader(name, shards, all_at_once)


def test_readers_write_only_into_their_buffer(name: str, shards: list[Path]) -> None:
    memory = page_aligned(3 * PAGE)

    def middle(reader: Reader) -> None:
        reader.read(0, 2 * PAGE, memory[PAGE : 2 * PAGE])

    with_reader(name, shards, middle)
    assert memory[:PAGE] == memory[2 * PAGE :] == bytes(PAGE)
    assert memory[PAGE : 2 * PAGE] == shards[0].read_bytes()[2 * PAGE : 3 * PAGE]


def test_many_reads_of_one_shard_do_not_mix(name: str, shards: list[Path]) -> None:
    """More reads than were announced, of a file that has one position for all of them."""
    truth = shards[0].read_bytes()
    buffers = [page_aligned(PAGE) for _ in range(NUM_PAGES[0] * 4)]

    def flood(reader: Reader) -> None:
        at_once(
            [
                partial(reader.read, 0, i % NUM_PAGES[0] * PAGE, buffer)
                for i, buffer in enumerate(buffers)
            ]
        )

    with_reader(name, shards, flood, depth=3)
    for i, buffer in enumerate(buffers):
        page = i % NUM_PAGES[0]
        assert buffer == truth[page * PAGE : (page + 1) * PAGE]


def test_a_file_truncated_under_a_reader_is_an_error(name: str, shards: list[Path]) -> None:
    """Not a SIGBUS in a mapping, and not zeros."""

    def read_after_truncation(reader: Reader) -> None:
        buffer = page_aligned(PAGE)
        reader.read(0, 30 * PAGE, buffer)
        os.truncate(shards[0], 10 * PAGE)
        with pytest.raises(OSError):
            reader.read(0, 30 * PAGE, buffer)
        reader.read(0, 9 * PAGE, buffer)

    with_reader(name, shards, read_after_truncation)


def test_a_reader_lets_go_of_its_files(name: str, shards: list[Path]) -> None:
    def read_one(reader: Reader) -> None:
        reader.read(0, 0, page_aligned(PAGE))

    def held() -> set[str]:
        found = set()
        for entry in os.scandir("/proc/self/fd"):
            with suppress(OSError):
                found.add(os.readlink(entry.path))
        return found & {str(path) for path in shards}

    with_reader(name, shards, read_one)
    assert not held()


def test_a_missing_file_is_an_error_with_errno(name: str, tmp_path: Path) -> None:
    def read_one(reader: Reader) -> None:
        reader.read(0, 0, page_aligned(PAGE))

    with pytest.raises(OSError) as caught:
        with_reader(name, [tmp_path / "missing"], read_one)
    assert caught.value.errno == errno.ENOENT


# -- which reader is used ---------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["mmap", "buffered"])
def test_readers_that_always_work_are_used_as_asked(asked: str, shards: list[Path]) -> None:
    assert choose_reader(asked, shards) == (asked, "as asked", False)


def test_an_unknown_reader_is_refused_with_the_choices(shards: list[Path]) -> None:
    with pytest.raises(UsageError, match="auto, direct, mmap, buffered, gds"):
        choose_reader("io_uring", shards)


@pytest.mark.parametrize("asked", ["auto", "direct"])
def test_a_tmpfs_is_recognised_although_it_opens_with_o_direct(
    asked: str, memory_directory: Path
) -> None:
    shard = memory_directory / "shard"
    shard.write_bytes(bytes(PAGE))
    choice = choose_reader(asked, [shard])
    assert (choice.name, choice.fallback) == ("buffered", True)
    assert str(memory_directory) in choice.reason and "tmpfs" in choice.reason


def test_one_directory_without_direct_io_is_enough_to_fall_back(
    shards: list[Path], memory_directory: Path
) -> None:
    shard = memory_directory / "shard"
    shard.write_bytes(bytes(PAGE))
    choice = choose_reader("auto", [*shards, shard])
    assert choice.fallback and str(memory_directory) in choice.reason


def test_strict_makes_missing_direct_io_an_error(memory_directory: Path) -> None:
    shard = memory_directory / "shard"
    shard.write_bytes(bytes(PAGE))
    with pytest.raises(UsageError, match="tmpfs.*--strict"):
        choose_reader("direct", [shard], strict=True)


def test_a_refused_o_direct_is_a_fallback_with_the_systems_reason(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "open", refuse)
    choice = choose_reader("auto", shards)
    assert choice == (
        "buffered",
        f"{shards[0].parent}: O_DIRECT is refused (Invalid argument)",
        True,
    )


def test_a_failing_o_direct_read_is_a_fallback(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("tierrun.io.reader._filesystem_type", lambda path: 0)
    monkeypatch.setattr(os, "preadv", fail)
    choice = choose_reader("auto", shards)
    assert choice.name == "buffered" and choice.fallback
    assert "Input/output error" in choice.reason or "refused" in choice.reason


def test_direct_io_is_chosen_where_it_works(shards: list[Path]) -> None:
    """On a disk that takes O_DIRECT, `auto` is direct, and says why."""
    try:
        os.close(os.open(shards[0], os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT on this machine's disk")
    choice = choose_reader("auto", shards)
    assert choice.name == "direct" or "tmpfs" in choice.reason
    assert choice.reason
