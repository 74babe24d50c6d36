"""Any flipped bit is found and named; what a store holds is told."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from tests.checkpoints import tiny_checkpoint

from tierrun.io.errors import CorruptError
from tierrun.io.store import ExpertKey, Store
from tierrun.tools.convert import convert
from tierrun.tools.listing import as_json, listing
from tierrun.tools.progress import progress_bar
from tierrun.tools.verify import verify


@pytest.fixture
def store(tmp_path: Path) -> Store:
    source = tiny_checkpoint("mixtral", tmp_path / "source")
    convert(source, tmp_path / "store", shard_bytes=400 << 10)
    return Store.open([tmp_path / "store"])


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_intact_store(store: Store) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(store, lambda done, total: seen.append((done, total)))
    assert report.num_records == 16
    assert report.nbytes == sum(shard.nbytes for shard in store.manifest.shards)
    assert report.bytes_per_second > 0
    assert seen[-1] == (report.nbytes, report.nbytes)


@pytest.mark.parametrize("where", [0, 0.5, 1])
@pytest.mark.parametrize("key", [ExpertKey(0, 0), ExpertKey(1, 5)])
def test_flipped_bit_in_a_record(store: Store, key: ExpertKey, where: float) -> None:
    record, extent = store.locate(key)
    path = store.shard_paths[record.shard]
    flip(path, extent.offset + int(where * (extent.nbytes - 1)))
    with pytest.raises(CorruptError, match=f"{path.name}: layer {key.layer}, expert {key.expert}"):
        verify(store)


def test_flipped_bit_in_a_resident_weight(store: Store) -> None:
    resident = store.manifest.residents[3]
    path = store.shard_paths[resident.shard]
    flip(path, resident.extent.end - 1)
    with pytest.raises(CorruptError, match=f"{path.name}: tensor {resident.name}"):
        verify(store)


@pytest.mark.parametrize("offset", [0, 100, 4095])
def test_flipped_bit_in_a_header(store: Store, offset: int) -> None:
    flip(store.shard_paths[-1], offset)
    with pytest.raises(CorruptError, match=f"{store.manifest.shards[-1].name}: header"):
        verify(store)


def test_many_problems_are_counted(store: Store) -> None:
    for number in range(2):
        for expert in range(8):
            record, extent = store.locate(ExpertKey(number, expert))
            flip(store.shard_paths[record.shard], extent.offset)
    with pytest.raises(CorruptError, match="and 11 more"):
        verify(store)


def test_truncated_shard_while_verifying(store: Store) -> None:
    record, extent = store.locate(ExpertKey(1, 7))
    with store.shard_paths[record.shard].open("r+b") as file:
        file.truncate(extent.end - 1)
    with pytest.raises(CorruptError, match="layer 1, expert 7 (ends early|is corrupt)"):
        verify(store)


def test_listing(store: Store) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(listing(store))
    text = console.export_text()
    words = ("mixtral", "16 records", "f32", "gate_up_proj f32 [192, 64]", "32.00")
    assert all(word in text for word in words)
    data = json.loads(json.dumps(as_json(store)))
    assert data["num_experts"] == 16
    assert sum(data["resident_bytes_by_codec"].values()) == data["resident_bytes"]
    (cls,) = data["record_classes"]
    assert (cls["bytes"], cls["codecs"], cls["num_records"]) == (73728, ["f32"], 16)
    assert cls["matrices"][1] == {"name": "down_proj", "codec": "f32", "shape": [64, 96]}


def test_progress_bar_is_silent_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("converting") as progress:
        progress(1, 2)
        progress(2, 2)
    assert capfd.readouterr() == ("", "")
