"""A store opens whole or says what is wrong with it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.fakes import Experts, TinyStore, tiny_store

from tierrun.io.errors import CorruptError, StoreError, VersionError
from tierrun.io.extent import PAGE, Extent
from tierrun.io.header import read_header
from tierrun.io.store import ExpertKey, Manifest, Resident, Store, read_manifest, record_name

LAYERS = (Experts(pages=2), Experts(num=3, top_k=1, pages=1), Experts(pages=2))


@pytest.fixture
def stored(tmp_path: Path) -> TinyStore:
    """Two record classes over two directories, on disk."""
    tiny = tiny_store(LAYERS, (tmp_path / "a", tmp_path / "b"))
    tiny.write()
    return tiny


def with_resident(manifest: Manifest) -> Manifest:
    resident = Resident("lm_head.weight", 0, "F32", (4, 8), Extent(PAGE, 128), 2**64 - 1)
    return replace(manifest, residents=(resident,))


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = with_resident(tiny_store(LAYERS).store.manifest)
    assert Manifest.from_json(manifest.to_json(), tmp_path) == manifest


def test_the_same_manifest_gives_the_same_text() -> None:
    assert (
        tiny_store(LAYERS).store.manifest.to_json() == tiny_store(LAYERS).store.manifest.to_json()
    )


def test_sizes_add_up() -> None:
    manifest = with_resident(tiny_store(LAYERS).store.manifest)
    assert manifest.num_experts == 6 + 3 + 6
    assert manifest.expert_bytes == (6 * 2 + 3 * 1 + 6 * 2) * PAGE
    assert manifest.resident_bytes == 128
    assert [manifest.class_of(layer).nbytes for layer in range(3)] == [2 * PAGE, PAGE, 2 * PAGE]


def test_shards_are_safetensors_files_with_one_tensor_per_expert(stored: TinyStore) -> None:
    found = {}
    for path in stored.store.shard_paths:
        with safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name).tobytes() for name in file.keys()}
    keys = [ExpertKey(n, e) for n, layer in enumerate(LAYERS) for e in range(layer.num)]
    assert found == {record_name(key): stored.record(key) for key in keys}


def test_an_expert_is_located_where_its_shard_has_it(stored: TinyStore) -> None:
    for layer, expert in ((0, 0), (1, 2), (2, 5)):
        key = ExpertKey(layer, expert)
        record, extent = stored.store.locate(key)
        header = read_header(stored.store.shard_paths[record.shard])
        assert header[record_name(key)].extent == extent


def test_shards_are_found_in_any_directory(stored: TinyStore) -> None:
    a, b = stored.store.roots
    (b / stored.store.manifest.shards[1].name).rename(a / stored.store.manifest.shards[1].name)
    assert {path.parent for path in Store.open([a, b]).shard_paths} == {a}


def test_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere: no such directory"):
        Store.open([tmp_path / "nowhere"])


def test_a_directory_without_manifest_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="tierrun convert"):
        Store.open([tmp_path])


def test_an_unfinished_conversion_says_so(tmp_path: Path) -> None:
    (tmp_path / "convert.journal").touch()
    with pytest.raises(StoreError, match="unfinished conversion"):
        read_manifest(tmp_path)


def test_a_missing_shard_is_named_with_the_remedy(stored: TinyStore) -> None:
    with pytest.raises(StoreError, match="experts-00002-of-00002.*--nvme-dir"):
        Store.open(stored.store.roots[:1])


@pytest.mark.parametrize("change", [-1, -PAGE, 1])
def test_a_shard_of_another_size_is_refused_at_open(change: int, stored: TinyStore) -> None:
    path = stored.store.shard_paths[1]
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(CorruptError, match=f"{len(data) + change} bytes.*{len(data)}"):
        Store.open(stored.store.roots)


def test_a_newer_version_is_refused_with_both_numbers(stored: TinyStore) -> None:
    path = stored.store.roots[0] / "store.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(VersionError, match="format 7.*up to 1"):
        Store.open(stored.store.roots)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff\xff", b"[" * 100_000, b'{"format": 1e999}']
)
def test_what_is_no_manifest_is_corrupt(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_bytes(raw)
    with pytest.raises(CorruptError, match="store.json"):
        Store.open([tmp_path])


def spoil(change: Callable[[dict[str, Any]], None], manifest: Manifest) -> str:
    document = json.loads(manifest.to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.pop("layers"), "malformed"),
        (lambda d: d["layers"].clear(), "no experts"),
        (lambda d: d["layers"][0].update(record_class=2), "record class 2"),
        (lambda d: d["layers"][0].update(record_class=-1), "record class -1"),
        (lambda d: d["layers"][0].update(top_k=0), "top-0"),
        (lambda d: d["layers"][0].update(top_k=7), "top-7"),
        (lambda d: d["layers"][0]["records"].__setitem__(0, "2:4096:0"), "shard 2 of 1"),
        (lambda d: d["layers"][0]["records"].__setitem__(0, "-1:4096:0"), "shard -1 of 1"),
        (lambda d: d["layers"][0]["records"].__setitem__(0, "0:-4096:0"), "ends at"),
        (lambda d: d["layers"][0]["records"].__setitem__(0, "0:409600000:0"), "ends at"),
        (lambda d: d["layers"][0]["records"].__setitem__(0, "0:4097:0"), "not aligned"),
        (lambda d: d["layers"][0]["records"].__setitem__(0, "0:4096"), "malformed"),
        (lambda d: d["record_classes"][0].update(bytes=100), "record class 0 of 100 bytes"),
        (lambda d: d["record_classes"][0].update(bytes=0), "record class 0 of 0 bytes"),
        (lambda d: d["record_classes"][0]["matrices"][0].update(offset=64), "outside its record"),
        (lambda d: d["record_classes"][0]["matrices"][0].update(bytes=-1), "outside its record"),
        (lambda d: d["resident"][0].update(bytes=1 << 40), "lm_head.weight ends at"),
        (lambda d: d["resident"][0].update(shard=9), "lm_head.weight lies in shard 9"),
    ],
)
def test_a_number_out_of_bounds_is_named(
    change: Callable[[dict[str, Any]], None], complaint: str, tmp_path: Path
) -> None:
    manifest = with_resident(tiny_store(LAYERS).store.manifest)
    with pytest.raises(CorruptError, match=complaint):
        Manifest.from_json(spoil(change, manifest), tmp_path / "store.json")


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict | list):
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for name, child in children:
            yield from leaves(child, (*path, name))
    yield path


DOCUMENT = json.loads(with_resident(tiny_store(LAYERS).store.manifest).to_json())
ANYTHING = (
    st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})
    | st.sampled_from(["0:4096:0", "9:0:0", "0:1:2:3", "-1", "1e999"])
)  # fmt: skip


@given(place=st.sampled_from([path for path in leaves(DOCUMENT) if path]), value=ANYTHING)
@settings(max_examples=400)
def test_a_manifest_with_anything_anywhere_opens_within_bounds_or_is_refused(
    place: tuple[Any, ...], value: Any
) -> None:
    document = json.loads(json.dumps(DOCUMENT))
    node = document
    for name in place[:-1]:
        node = node[name]
    node[place[-1]] = value
    try:
        manifest = Manifest.from_json(json.dumps(document), Path("store.json"))
    except StoreError:
        return
    for number, layer in enumerate(manifest.layers):
        for record in layer.records:
            end = record.offset + manifest.class_of(number).nbytes
            assert 0 <= record.offset < end <= manifest.shards[record.shard].nbytes
