"""A conversion stopped at any moment continues and ends with the same bytes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.checkpoints import reference, tiny_checkpoint
from tests.kills import convert_with_kills
from tests.stores import assert_same_weights, contents

from tierrun.io.errors import DiskFullError, StoreError, UsageError
from tierrun.io.store import Store
from tierrun.tools.convert import convert
from tierrun.tools.journal import JOURNAL


def interrupt(source: Path, target: Path, share: float) -> None:
    """Convert `share` of the bytes, then leave as Ctrl-C does."""

    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, progress=progress)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_interrupted_conversion_continues(source: Path, tmp_path: Path, share: float) -> None:
    interrupt(source, tmp_path / "store", share)
    with pytest.raises(StoreError, match="unfinished conversion"):
        Store.open([tmp_path / "store"])
    first: list[int] = []
    convert(source, tmp_path / "store", progress=lambda done, total: first.append(done))
    convert(source, tmp_path / "whole")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    whole = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    assert first[0] >= share * whole * 0.9  # what was written is not written again


def test_torn_journal_line_and_lost_shard(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "store", 0.95)
    with (tmp_path / "store" / JOURNAL).open("ab") as file:
        file.write(b'[17, "0123')
    next((tmp_path / "store").glob("experts-*")).unlink()
    convert(source, tmp_path / "store")
    convert(source, tmp_path / "whole")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_unfinished_conversion_of_something_else(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path, 0.5)
    with pytest.raises(UsageError, match="unfinished conversion of something else"):
        convert(source, tmp_path, dtype="bf16")
    convert(source, tmp_path, dtype="bf16", force=True)
    assert_same_weights(Store.open([tmp_path]), reference(source, torch.bfloat16))


@pytest.mark.parametrize("num_directories", [1, 2])
def test_killed_conversion_continues(tmp_path: Path, num_directories: int) -> None:
    source = tiny_checkpoint(
        "mixtral", tmp_path / "source", hidden_size=512, intermediate_size=1024, seed=3
    )
    stores = [tmp_path / "store" / str(n) for n in range(num_directories)]
    whole = [tmp_path / "whole" / str(n) for n in range(num_directories)]
    kills = convert_with_kills(source, stores, kills=3, seed=num_directories)
    assert kills == 3
    convert(source, whole)
    assert contents(*stores) == contents(*whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes, three of them taken by the file `hog`."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    (mount / "hog").write_bytes(bytes(3 << 20))
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_disk_too_small_is_told_before_writing(source: Path, small_disk: Path) -> None:
    with pytest.raises(DiskFullError, match=r"\d+ bytes .* still needed, \d+ .* free"):
        convert(source, small_disk / "store")
    assert not list((small_disk / "store").iterdir())


def test_disk_filling_up_is_resumable(source: Path, small_disk: Path, tmp_path: Path) -> None:
    """Somebody takes the room that was free at the start, and gives it back later."""
    (small_disk / "hog").unlink()

    def fill(done: int, total: int) -> None:
        if not (small_disk / "hog").exists():
            (small_disk / "hog").write_bytes(bytes(3 << 20))

    store = small_disk / "store"
    with pytest.raises(DiskFullError, match="make room and run the same command again"):
        convert(source, store, shard_bytes=400 << 10, progress=fill)
    assert list(store.glob("*.safetensors"))
    with pytest.raises(StoreError, match="unfinished"):
        Store.open([store])
    (small_disk / "hog").unlink()
    convert(source, store, shard_bytes=400 << 10)
    convert(source, tmp_path / "whole", shard_bytes=400 << 10)
    assert contents(store) == contents(tmp_path / "whole")
