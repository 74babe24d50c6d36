"""Where every byte of a store goes, settled from shapes and dtypes alone.

A layout is a manifest whose checksums are still zero, plus what only the writer needs: the headers
and the directory of each shard. The same blueprint gives the same layout, wherever it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from tierrun.io.extent import PAGE, Extent, align_up
from tierrun.io.header import DTYPE_BYTES, build_header
from tierrun.io.store import (
    ExpertKey,
    Layer,
    Manifest,
    Matrix,
    Record,
    RecordClass,
    Resident,
    Shard,
    record_name,
)
from tierrun.tools.blueprint import Blueprint, LayerRecipe
from tierrun.tools.residents import ResidentRecipe

SHARD_BYTES = 8 << 30
"""Default size of a data file: few files, none too large to copy about."""

MATRIX_ALIGNMENT = 64
"""A cache line, and more than any kernel's vector loads ask for."""

_METADATA = {"format": "pt"}

_Entry = tuple[str, tuple[int, ...], int]


class Identity(NamedTuple):
    """What a manifest says about its origin."""

    tool: str
    model_id: str
    architecture: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Layout:
    """`manifest` without checksums; the header and the directory (an ordinal) of each shard."""

    manifest: Manifest
    headers: tuple[bytes, ...]
    homes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _File:
    """A data file to be: kind, directory, and its tensors (name → dtype, shape, bytes)."""

    kind: str
    home: int
    tensors: dict[str, _Entry]


def lay_out(
    blueprint: Blueprint, identity: Identity, num_directories: int, shard_bytes: int
) -> Layout:
    """The layout of `blueprint`'s store over `num_directories` directories."""
    classes = [_class(layer) for layer in blueprint.layers]
    residents = sorted(blueprint.residents, key=lambda r: (-r.alignment, r.name))
    files = _resident_files(residents, shard_bytes)
    for home in range(num_directories):
        files += _expert_files(blueprint.layers, classes, home, num_directories, shard_bytes)
    headers, shards, places = _place(files)
    order = list(dict.fromkeys(classes))
    manifest = Manifest(
        *identity,
        classes=tuple(order),
        layers=tuple(
            _layer(number, layer, order.index(cls), places)
            for number, (layer, cls) in enumerate(zip(blueprint.layers, classes, strict=True))
        ),
        residents=tuple(_resident(resident, *places[resident.name]) for resident in residents),
        shards=tuple(shards),
    )
    return Layout(manifest, tuple(headers), tuple(file.home for file in files))


def _class(layer: LayerRecipe) -> RecordClass:
    matrices, offset = [], 0
    for recipe in layer.matrices:
        offset = align_up(offset, MATRIX_ALIGNMENT)
        extent = Extent(offset, recipe.nbytes)
        matrices.append(Matrix(recipe.name, recipe.codec, recipe.shape, extent))
        offset = extent.end
    return RecordClass(align_up(offset, PAGE), tuple(matrices))


def _resident_files(residents: Sequence[ResidentRecipe], shard_bytes: int) -> list[_File]:
    entries = {r.name: _entry(r) for r in residents}
    return [_File("resident", 0, part) for part in _split(entries, shard_bytes)]


def _entry(recipe: ResidentRecipe) -> _Entry:
    """What the file says; packed weights are bytes, filled up so that the next is aligned."""
    if recipe.dtype in DTYPE_BYTES:
        return recipe.dtype, recipe.shape, recipe.nbytes
    nbytes = align_up(recipe.nbytes, recipe.alignment)
    return "U8", (nbytes,), nbytes


def _expert_files(
    layers: Sequence[LayerRecipe],
    classes: Sequence[RecordClass],
    home: int,
    num_directories: int,
    shard_bytes: int,
) -> list[_File]:
    """The files of directory `home`: expert e of layer l is dealt to directory (l + e) mod D."""
    entries: dict[str, _Entry] = {
        record_name(ExpertKey(number, expert)): ("U8", (cls.nbytes,), cls.nbytes)
        for number, (layer, cls) in enumerate(zip(layers, classes, strict=True))
        for expert in range(layer.num_experts)
        if (number + expert) % num_directories == home
    }
    return [_File("experts", home, part) for part in _split(entries, shard_bytes)]


def _split(entries: dict[str, _Entry], shard_bytes: int) -> list[dict[str, _Entry]]:
    """Consecutive `entries` in files of at most `shard_bytes`, or of one tensor if it is larger."""
    parts: list[dict[str, _Entry]] = []
    used = shard_bytes
    for name, entry in entries.items():
        # what a header says about one tensor, generously: names are ASCII, numbers below 2^64
        need = entry[2] + len(name) + 128 + 24 * len(entry[1])
        if used + need > shard_bytes:
            parts.append({})
            used = PAGE
        parts[-1][name] = entry
        used += need
    return parts


def _place(
    files: Sequence[_File],
) -> tuple[list[bytes], list[Shard], dict[str, tuple[int, Extent]]]:
    """Headers and shards of `files`, and for each tensor its shard and extent."""
    headers: list[bytes] = []
    shards: list[Shard] = []
    places: dict[str, tuple[int, Extent]] = {}
    for index, file in enumerate(files):
        header, extents = build_header(file.tensors, _METADATA)
        end = max(extent.end for extent in extents.values())
        places |= {name: (index, extent) for name, extent in extents.items()}
        headers.append(header)
        shards.append(Shard(_name(files, index), end, len(header), xxh3_64_intdigest(header)))
    return headers, shards, places


def _name(files: Sequence[_File], index: int) -> str:
    kind = files[index].kind
    number = sum(file.kind == kind for file in files[: index + 1])
    total = sum(file.kind == kind for file in files)
    return f"{kind}-{number:05d}-of-{total:05d}.safetensors"


def _layer(
    number: int, layer: LayerRecipe, record_class: int, places: dict[str, tuple[int, Extent]]
) -> Layer:
    records = []
    for expert in range(layer.num_experts):
        shard, extent = places[record_name(ExpertKey(number, expert))]
        records.append(Record(shard, extent.offset, 0))
    return Layer(layer.path, layer.top_k, record_class, tuple(records))


def _resident(recipe: ResidentRecipe, shard: int, place: Extent) -> Resident:
    extent = Extent(place.offset, recipe.nbytes)
    return Resident(recipe.name, shard, recipe.dtype, recipe.shape, extent, 0, recipe.inputs)
