"""Usage counts: accumulated over runs, written whole, never in a generation's way."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.fakes import Experts, tiny_store

from tierrun.io.store import Manifest
from tierrun.tiers.usage import Usage, UsageFile, top_shares

LAYERS = (Experts(4), Experts(3))


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's state directory, empty."""
    directory = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(directory))
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The directory of a store."""
    directory = tmp_path / "model"
    directory.mkdir()
    return directory


def manifest(seed: int = 0) -> Manifest:
    return tiny_store(LAYERS, seed=seed).store.manifest


def counts(*rows: list[int]) -> Usage:
    return [np.array(row, dtype=np.int64) for row in rows]


def read(root: Path) -> list[list[int]]:
    return [row.tolist() for row in UsageFile(root, manifest()).read()]


def make_read_only(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """As a read-only mount looks; permissions would not stop root, who runs containers."""
    real = os.access

    def access(path: Path, mode: int) -> bool:
        return real(path, mode) and not (mode == os.W_OK and Path(path).is_relative_to(root))

    monkeypatch.setattr(os, "access", access)


def test_a_new_store_has_no_counts(root: Path) -> None:
    assert read(root) == [[0] * 4, [0] * 3]
    assert not list(root.iterdir()), "reading writes nothing"


def test_counts_accumulate_over_runs(root: Path) -> None:
    UsageFile(root, manifest()).add(counts([1, 2, 3, 4], [0, 0, 1]))
    UsageFile(root, manifest()).add(counts([1, 0, 0, 0], [5, 0, 0]))
    assert read(root) == [[2, 2, 3, 4], [5, 0, 1]]
    assert UsageFile(root, manifest()).path == root / "usage.json"


def test_a_read_only_store_is_counted_in_the_state_directory(
    root: Path, state_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_read_only(monkeypatch, root)
    UsageFile(root, manifest()).add(counts([1, 1, 1, 1], [1, 1, 1]))
    assert read(root) == [[1] * 4, [1] * 3]
    assert not list(root.iterdir())
    assert UsageFile(root, manifest()).path.is_relative_to(state_home / "tierrun")


def test_read_only_stores_of_one_name_do_not_share_counts(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere" / "model"
    other.mkdir(parents=True)
    make_read_only(monkeypatch, tmp_path)
    assert UsageFile(root, manifest()).path != UsageFile(other, manifest()).path


def test_counts_of_another_model_are_ignored_and_replaced(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    UsageFile(root, manifest(seed=1)).add(counts([9] * 4, [9] * 3))
    assert read(root) == [[0] * 4, [0] * 3]
    assert "of another model" in caplog.text
    UsageFile(root, manifest()).add(counts([1] * 4, [1] * 3))
    assert read(root) == [[1] * 4, [1] * 3]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "\udcff", '{"counts": 3}', '{"counts": [["a"]]}', '{"counts": [[1e400]]}']
    + [json.dumps({"counts": [[10**30] * 4, [0] * 3]})],
)
def test_a_damaged_file_starts_again(
    text: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "usage.json").write_bytes(text.encode(errors="surrogateescape"))
    assert read(root) == [[0] * 4, [0] * 3]
    assert "start again" in caplog.text
    UsageFile(root, manifest()).add(counts([1] * 4, [1] * 3))
    assert read(root) == [[1] * 4, [1] * 3]


@pytest.mark.parametrize("rows", [[[1, 1, 1], [1, 1, 1]], [[1] * 4], [[[1] * 4] * 4, [[1]] * 3]])
def test_counts_of_another_shape_are_ignored(rows: object, root: Path) -> None:
    document = {"fingerprint": manifest().fingerprint, "counts": rows}
    (root / "usage.json").write_text(json.dumps(document))
    assert read(root) == [[0] * 4, [0] * 3]


def test_a_failed_write_leaves_the_old_counts_and_no_debris(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    UsageFile(root, manifest()).add(counts([1] * 4, [1] * 3))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        UsageFile(root, manifest()).add(counts([1] * 4, [1] * 3))
    assert "No space left" in caplog.text
    assert read(root) == [[1] * 4, [1] * 3]
    assert {path.name for path in root.iterdir()} == {"usage.json", "usage.lock"}


def test_concurrent_threads_all_count(root: Path) -> None:
    def work() -> None:
        for _ in range(10):
            UsageFile(root, manifest()).add(counts([1] * 4, [1] * 3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(root) == [[40] * 4, [40] * 3]


def add_ones(root: Path) -> None:
    for _ in range(5):
        UsageFile(root, manifest()).add(counts([1] * 4, [1] * 3))


def test_a_reader_never_sees_half_a_file(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_ones(root)
    writer = threading.Thread(target=add_ones, args=[root])
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(read(root)[0][0])
    writer.join()
    assert seen == sorted(seen) and all(5 <= count <= 10 for count in seen)
    assert not caplog.text


def test_shares_of_the_most_used() -> None:
    assert top_shares(np.array([0, 50, 30, 20]), (25, 50, 100)) == [0.5, 0.8, 1.0]
    assert top_shares(np.array([3, 1]), (25,)) == [0.375]
    assert top_shares(np.zeros(4, dtype=np.int64), (1, 10)) == [0.0, 0.0]
