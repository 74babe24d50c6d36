"""A conversion gives the same bytes wherever and however often it is done."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.checkpoints import reference, tiny_checkpoint
from tests.holes import hollow_checkpoint
from tests.stores import assert_same_weights, contents

from tierrun.io.errors import StoreError, UsageError
from tierrun.io.extent import PAGE
from tierrun.io.store import Store
from tierrun.tools.convert import convert
from tierrun.tools.journal import JOURNAL, Journal


def test_twice_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "a")
    convert(source, tmp_path / "elsewhere" / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "elsewhere" / "b")
    assert str(tmp_path) not in (tmp_path / "a" / "store.json").read_text()


def test_records_are_whole_pages_and_plain_safetensors(source: Path, tmp_path: Path) -> None:
    manifest = convert(source, tmp_path)
    for path in tmp_path.glob("experts-*.safetensors"):
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {f"layers.{n}.experts.{e}" for n in (0, 1) for e in range(8)}
    assert all(record.offset % PAGE == 0 for layer in manifest.layers for record in layer.records)


def test_shards_keep_their_limit(source: Path, tmp_path: Path) -> None:
    limit = 256 << 10
    manifest = convert(source, tmp_path, shard_bytes=limit)
    assert len(manifest.shards) > 4
    assert all(shard.nbytes <= limit for shard in manifest.shards)
    assert_same_weights(Store.open([tmp_path]), reference(source))


def test_two_directories_share_each_layer(source: Path, tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    manifest = convert(source, directories, shard_bytes=300 << 10)
    store = Store.open(directories)
    assert_same_weights(store, reference(source))
    for number, layer in enumerate(manifest.layers):
        homes = [store.shard_paths[record.shard].parent for record in layer.records]
        assert homes == [directories[(number + expert) % 2] for expert in range(8)]
    again = [tmp_path / "c", tmp_path / "d"]
    convert(source, again, shard_bytes=300 << 10)
    assert contents(*directories) == contents(*again)
    with pytest.raises(StoreError, match="in none of"):
        Store.open(directories[:1])


def test_model_files_are_copied_as_they_are(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").write_bytes(b'{"x": 1}\n')
    (copy / "chat_template.jinja").write_bytes(b"{{ messages }}")
    convert(copy, tmp_path / "store")
    names = {path.name for path in (tmp_path / "store" / "model").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"
    }  # fmt: skip
    for name in names:
        assert (tmp_path / "store" / "model" / name).read_bytes() == (copy / name).read_bytes()


def test_progress_reaches_the_end(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = convert(source, tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = manifest.expert_bytes + manifest.resident_bytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_finished_store_is_left_alone(source: Path, tmp_path: Path) -> None:
    first = convert(source, tmp_path)
    before = contents(tmp_path)
    (tmp_path / JOURNAL).write_text("killed before this could be removed")
    assert convert(source, tmp_path) == first
    assert contents(tmp_path) == before


def test_other_store_is_replaced_only_by_force(source: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint("mixtral", tmp_path / "other", seed=1)  # same shapes, other weights
    (other / "chat_template.jinja").write_text("")
    convert(other, tmp_path / "store", shard_bytes=200 << 10)
    with pytest.raises(UsageError, match="already holds a store"):
        convert(source, tmp_path / "store")
    convert(source, tmp_path / "store", force=True)
    convert(source, tmp_path / "fresh")
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


def test_strange_shards_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    convert(source, [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UsageError, match="exists already"):
        convert(source, tmp_path / "b")
    with pytest.raises(UsageError, match="belongs to another store"):
        convert(source, [tmp_path / "c", tmp_path / "a"])


def test_two_conversions_at_once(source: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(UsageError, match="another conversion is writing"):
        convert(source, tmp_path)
    journal.close()
    convert(source, tmp_path)


MEMORY = """
import sys
from tierrun.bench.peak import peak_rss
from tierrun.tools.convert import convert
base = peak_rss()
convert(sys.argv[1], sys.argv[2])
print(peak_rss() - base)
"""


@pytest.mark.parametrize("fused", [False, True])
def test_memory_stays_flat(tmp_path: Path, fused: bool) -> None:
    """1.5 GB (a file of holes) passes through a fraction of that."""
    source = hollow_checkpoint(tmp_path / "source", fused=fused)
    command = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record = Store.open([tmp_path / "store"]).manifest.classes[0].nbytes
    assert int(done.stdout) < (512 << 20) + 2 * record
    shutil.rmtree(tmp_path / "store")
