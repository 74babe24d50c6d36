"""What is read: test files without a name, stores, and the page cache about them."""

import errno
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import Experts, tiny_store

from tierrun.bench import io_testfile, pagecache
from tierrun.bench.io_sources import Source, stored_sources
from tierrun.bench.io_testfile import nameless_file
from tierrun.io.errors import DiskFullError, StoreError, TierrunError, UsageError
from tierrun.io.extent import PAGE

MIB = 1 << 20


def silent(done: int, whole: int) -> None:
    """No progress."""


# -- test files -------------------------------------------------------------------------------


def test_a_file_without_a_name_that_does_not_compress(tmp_path: Path) -> None:
    reports = list[tuple[int, int]]()
    nbytes = 20 * MIB + PAGE
    with nameless_file(tmp_path, nbytes + 1, lambda *report: reports.append(report)) as path:
        assert list(tmp_path.iterdir()) == []
        data = path.read_bytes()
        assert len(data) == nbytes == path.stat().st_size
        assert path.stat().st_blocks * 512 >= nbytes, "holes are not read from the drive"
        assert len(zlib.compress(data[:MIB], 1)) > 0.99 * MIB
        pages = {data[i : i + PAGE] for i in range(0, nbytes, PAGE)}
        assert len(pages) == nbytes // PAGE, "one page is like another"
    assert not path.exists()
    assert reports and max(reports) == (nbytes, nbytes)


def test_it_goes_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), nameless_file(tmp_path, MIB, silent) as path:
        raise RuntimeError
    assert not path.exists() and list(tmp_path.iterdir()) == []


def test_file_systems_without_nameless_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without(path: Any, flags: int, *more: Any, **kwargs: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *more, **kwargs)

    monkeypatch.setattr(os, "open", without)
    with nameless_file(tmp_path, MIB, silent) as path:
        assert len(path.read_bytes()) == MIB
        assert list(tmp_path.iterdir()) == []


def test_no_room_says_asked_and_free(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    with pytest.raises(DiskFullError, match=rf"{2 * free} bytes .* asked .* free; .*--size"):
        nameless_file(tmp_path, 2 * free, silent).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_the_usual_size_takes_a_quarter_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(nbytes: int) -> None:
        values = (1, 1, 0, 0, nbytes, 0, 0, 0, 0, 255)
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))

    free(4096 * MIB)
    assert io_testfile._room(tmp_path, None) == 1024 * MIB
    free(1 << 50)
    assert io_testfile._room(tmp_path, None) == io_testfile.USUAL_BYTES
    free(1000 * MIB)
    with pytest.raises(DiskFullError, match="no room for a test file"):
        io_testfile._room(tmp_path, None)
    assert io_testfile._room(tmp_path, 999 * MIB) == 999 * MIB


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, DiskFullError, "became full while"),
        (errno.EIO, TierrunError, "writing the test file failed"),
    ],
)
def test_a_disk_that_fails_while_it_is_written(
    code: int,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.pwrite

    def failing(fd: int, data: Any, offset: int) -> int:
        if offset >= 16 * MIB:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(error, match=message):
        nameless_file(tmp_path, 64 * MIB, silent).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(UsageError, match="no such directory"):
            nameless_file(tmp_path / name, MIB, silent).__enter__()


# -- stores -----------------------------------------------------------------------------------


def test_a_store_is_read_at_its_records(tmp_path: Path) -> None:
    tiny = tiny_store([Experts(pages=1), Experts(pages=3)], [tmp_path / "a", tmp_path / "b"])
    tiny.write()
    found = stored_sources([tmp_path / "b", tmp_path / "a"])
    assert set(found) == {tmp_path / "a", tmp_path / "b"}
    for directory, source in found.items():
        assert set(source.records) == {PAGE, 3 * PAGE}
        assert source.num_places(PAGE) == 3
        (shard,) = (i for i, p in enumerate(tiny.store.shard_paths) if p.parent == directory)
        assert source.paths == (tiny.store.shard_paths[shard],)
        for place in source.places(3 * PAGE, shuffled=True, seed=1):
            data = tiny.images[shard][place.offset : place.offset + 3 * PAGE]
            assert any(data == tiny.record(key) for key in _keys(tiny))


def _keys(tiny: Any) -> list[Any]:
    from tierrun.io.store import ExpertKey

    layers = enumerate(tiny.store.manifest.layers)
    return [ExpertKey(n, e) for n, layer in layers for e in range(len(layer.records))]


def test_a_store_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    tiny = tiny_store([Experts()], [tmp_path / "a", tmp_path / "b"])
    tiny.write()
    with pytest.raises(StoreError, match="is in none of"):
        stored_sources([tmp_path / "a"])
    assert stored_sources([tmp_path / "b"]) == {}


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    pages=st.integers(1, 7),
    most=st.integers(1, 50),
    shuffled=st.booleans(),
    seed=st.integers(0, 5),
)
def test_places_do_not_overlap_and_lie_in_their_files(
    sizes: list[int],
    pages: int,
    most: int,
    shuffled: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("files")
    paths = tuple(directory / str(i) for i in range(len(sizes)))
    for path, size in zip(paths, sizes, strict=True):
        path.touch()
        os.truncate(path, size * PAGE)
    source, nbytes = Source(directory, paths, "files"), pages * PAGE
    count = source.num_places(nbytes)
    assert count == sum(size // pages for size in sizes)
    places = source.places(nbytes, shuffled=shuffled, seed=seed) if count else []
    assert len(set(places)) == len(places) == count
    first = source.first_places(nbytes, shuffled=shuffled, most=most)
    assert len(set(first)) == len(first) == min(most, count)
    assert sorted(first) == sorted(places)[: len(first)]
    for place in places:
        assert place.offset % nbytes == 0
        assert place.offset + nbytes <= sizes[place.shard] * PAGE
    assert shuffled or places == sorted(places)
    largest = source.largest_file()
    assert largest.nbytes == max(sizes) * PAGE


# -- the page cache ---------------------------------------------------------------------------


def test_dropped_files_are_not_cached(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(os.urandom(4 * MIB))
        os.fsync(file.fileno())
    path.read_bytes()
    assert pagecache.cached_share(path) == 1.0
    pagecache.drop([path])
    assert pagecache.cached_share(path) == 0.0


def test_files_of_others_and_empty_ones_have_no_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.touch()
    assert pagecache.cached_share(path) is None
    path.write_bytes(b"1")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert pagecache.cached_share(path) is None
