"""The store: a directory (or several) of safetensors files with an index, `store.json`.

    store.json                            the manifest below; without it there is no store
    experts-00001-of-000NN.safetensors    one U8 tensor per expert, `layers.{l}.experts.{e}`
    resident-00001-of-000NN.safetensors   every other weight under its name in the model
    model/                                config, generation config, tokenizer, chat template

A record is one expert, whole: page-aligned, a multiple of a page long, one read. The manifest holds
no time and no absolute path, so that the same source gives the same bytes. With several
directories the first holds the manifest and shards may lie in any.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tierrun.io.errors import CorruptError, StoreError, VersionError
from tierrun.io.extent import PAGE, Extent
from tierrun.io.header import DTYPE_BYTES

FORMAT_VERSION = 1
DENSE_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
"""Bytes per element of the codecs that store numbers as they are."""

MANIFEST = "store.json"
MODEL_DIR = "model"


class ExpertKey(NamedTuple):
    """An expert: the ordinal of its experts module in the model, and its index there."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a record, [out, in] (or a bias, [out]), at `extent` inside the record."""

    name: str
    codec: str
    shape: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True, slots=True)
class RecordClass:
    """Records of one size and layout; each class has slots of its own in the tiers."""

    nbytes: int
    matrices: tuple[Matrix, ...]


class Record(NamedTuple):
    """Where an expert lies: index of its shard, byte offset there, xxh3-64 of all its bytes."""

    shard: int
    offset: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One experts module: its path in the model, experts used per token, and records by expert."""

    path: str
    top_k: int
    record_class: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Resident:
    """A weight that every token reads, stored under the model's own name for it.

    `dtype` is a safetensors dtype or, where the file has a U8 tensor, a codec. `inputs` names an
    I32 resident of its own [in] where columns are stored in another order than the model's: column
    j multiplies input `inputs[j]`.
    """

    name: str
    shard: int
    dtype: str
    shape: tuple[int, ...]
    extent: Extent
    checksum: int
    inputs: str | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A data file: name, size, and the xxh3-64 of its header."""

    name: str
    nbytes: int
    header_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything `store.json` says."""

    tool: str
    model_id: str
    architecture: str
    fingerprint: str
    classes: tuple[RecordClass, ...]
    layers: tuple[Layer, ...]
    residents: tuple[Resident, ...]
    shards: tuple[Shard, ...]

    @property
    def num_experts(self) -> int:
        return sum(len(layer.records) for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        return sum(
            self.class_of(index).nbytes * len(x.records) for index, x in enumerate(self.layers)
        )

    @property
    def resident_bytes(self) -> int:
        return sum(resident.extent.nbytes for resident in self.residents)

    def class_of(self, layer: int) -> RecordClass:
        return self.classes[self.layers[layer].record_class]

    def to_json(self) -> str:
        """The text of `store.json`: stable order, checksums in hexadecimal."""
        document = {
            "format": FORMAT_VERSION,
            "tool": self.tool,
            "model_id": self.model_id,
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "record_classes": [_class_to_json(c) for c in self.classes],
            "shards": [
                {
                    "name": s.name,
                    "bytes": s.nbytes,
                    "header": s.header_bytes,
                    "xxh3": _hex(s.checksum),
                }
                for s in self.shards
            ],
            "layers": [_layer_to_json(layer) for layer in self.layers],
            "resident": [
                {
                    "name": r.name,
                    "shard": r.shard,
                    "dtype": r.dtype,
                    "shape": list(r.shape),
                    "offset": r.extent.offset,
                    "bytes": r.extent.nbytes,
                    "xxh3": _hex(r.checksum),
                    **({"inputs": r.inputs} if r.inputs else {}),
                }
                for r in self.residents
            ],
        }
        return json.dumps(document, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, path: Path) -> "Manifest":
        """Parse and check `store.json`.

        Raises:
            VersionError: a format newer than this program reads.
            CorruptError: not JSON, a field missing, or a number outside its file.
        """
        try:
            document = json.loads(text)
            version = int(document["format"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise CorruptError(
                f"{path} is not a store's manifest; convert the model again"
            ) from None
        if version > FORMAT_VERSION:
            raise VersionError(
                f"{path} has store format {version}, this tierrun reads up to {FORMAT_VERSION}; "
                "update tierrun or convert again"
            )
        try:
            manifest = _parse(document)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptError(f"{path}: malformed manifest ({error!r})") from None
        _check_bounds(manifest, path)
        return manifest


def record_name(key: ExpertKey) -> str:
    """The tensor name of a record in its safetensors file."""
    return f"layers.{key.layer}.experts.{key.expert}"


class Store:
    """An opened store: the manifest, and where each shard was found.

    Opening checks that every shard is there at its full size (a truncated file under a mapping
    would be a SIGBUS); checksums are left to the first read of each record.
    """

    def __init__(self, manifest: Manifest, roots: tuple[Path, ...], shard_paths: tuple[Path, ...]):
        self.manifest = manifest
        self.roots = roots
        self.shard_paths = shard_paths

    @classmethod
    def open(cls, directories: Sequence[Path | str]) -> "Store":
        """Open the store whose manifest is in the first of `directories`.

        Raises:
            StoreError: no such directory, not a store, or a shard missing everywhere.
            VersionError, CorruptError: as `Manifest.from_json`; also a shard of the wrong size.
        """
        roots = tuple(Path(directory) for directory in directories)
        manifest = read_manifest(roots[0])
        paths = tuple(_find_shard(i, manifest, roots) for i in range(len(manifest.shards)))
        return cls(manifest, roots, paths)

    @property
    def model_dir(self) -> Path:
        return self.roots[0] / MODEL_DIR

    def locate(self, key: ExpertKey) -> tuple[Record, Extent]:
        """The record of `key` and its byte range in its shard."""
        layer = self.manifest.layers[key.layer]
        record = layer.records[key.expert]
        return record, Extent(record.offset, self.manifest.classes[layer.record_class].nbytes)


def read_manifest(root: Path) -> Manifest:
    """The manifest of the store at `root`, without a look at its shards."""
    if not root.is_dir():
        raise StoreError(f"{root}: no such directory")
    path = root / MANIFEST
    if not path.is_file():
        unfinished = (root / "convert.journal").is_file()
        hint = "an unfinished conversion; run the same `tierrun convert` again to finish it"
        raise StoreError(
            f"{root} is not a store: "
            + (hint if unfinished else f"it has no {MANIFEST}; make one with `tierrun convert`")
        )
    return Manifest.from_json(path.read_text(errors="replace"), path)


def _find_shard(index: int, manifest: Manifest, roots: tuple[Path, ...]) -> Path:
    shard = manifest.shards[index]
    for root in roots:
        path = root / shard.name
        if not path.is_file():
            continue
        size = path.stat().st_size
        if size != shard.nbytes:
            raise CorruptError(
                f"{path} has {size} bytes, the store says {shard.nbytes}: truncated or overwritten"
                f"{_first_lost(index, size, manifest)}; convert the model again"
            )
        return path
    raise StoreError(
        f"shard {shard.name} is in none of {', '.join(map(str, roots))}; "
        "name every directory of the store with --nvme-dir"
    )


def _first_lost(index: int, size: int, manifest: Manifest) -> str:
    """What of a shard that ends at `size` is the first to be incomplete."""
    lost = [
        (record.offset, f"layer {number}, expert {expert}")
        for number, layer in enumerate(manifest.layers)
        for expert, record in enumerate(layer.records)
        if record.shard == index and record.offset + manifest.class_of(number).nbytes > size
    ]
    lost += [
        (resident.extent.offset, resident.name)
        for resident in manifest.residents
        if resident.shard == index and resident.extent.end > size
    ]
    return f", lost from {min(lost)[1]} on" if lost else ""


def _check_bounds(manifest: Manifest, path: Path) -> None:
    def check(what: str, shard: int, extent: Extent) -> None:
        if not 0 <= shard < len(manifest.shards):
            raise CorruptError(f"{path}: {what} lies in shard {shard} of {len(manifest.shards)}")
        limit = manifest.shards[shard].nbytes
        if extent.offset < 0 or extent.nbytes < 0 or extent.end > limit:
            raise CorruptError(f"{path}: {what} ends at byte {extent.end} of {limit} in its shard")

    if not manifest.layers:
        raise CorruptError(f"{path}: no experts in it")
    for number, cls in enumerate(manifest.classes):
        _check_class(number, cls, path)
    for number, layer in enumerate(manifest.layers):
        if not 0 <= layer.record_class < len(manifest.classes):
            raise CorruptError(f"{path}: layer {number} has record class {layer.record_class}")
        if not 1 <= layer.top_k <= len(layer.records):
            raise CorruptError(
                f"{path}: layer {number} uses the top-{layer.top_k} of {len(layer.records)} experts"
            )
        nbytes = manifest.classes[layer.record_class].nbytes
        for expert, record in enumerate(layer.records):
            what = f"layer {number}, expert {expert}"
            if record.offset % PAGE:
                raise CorruptError(f"{path}: {what} is not aligned to {PAGE} bytes")
            check(what, record.shard, Extent(record.offset, nbytes))
    for resident in manifest.residents:
        check(resident.name, resident.shard, resident.extent)
        itemsize = DTYPE_BYTES.get(resident.dtype)
        if itemsize is not None and prod(resident.shape) * itemsize != resident.extent.nbytes:
            raise CorruptError(f"{path}: {resident.name} has a shape that is not its bytes")


def _check_class(number: int, cls: RecordClass, path: Path) -> None:
    if cls.nbytes <= 0 or cls.nbytes % PAGE:
        raise CorruptError(f"{path}: record class {number} of {cls.nbytes} bytes, not whole pages")
    for matrix in cls.matrices:
        if min(matrix.extent) < 0 or matrix.extent.end > cls.nbytes:
            raise CorruptError(f"{path}: {matrix.name} ends outside its record")
        itemsize = DENSE_BYTES.get(matrix.codec)
        if itemsize is not None and prod(matrix.shape) * itemsize != matrix.extent.nbytes:
            raise CorruptError(f"{path}: {matrix.name} has a shape that is not its bytes")


def _hex(checksum: int) -> str:
    return f"{checksum:016x}"


def _class_to_json(cls: RecordClass) -> dict[str, Any]:
    matrices = [
        {
            "name": m.name,
            "codec": m.codec,
            "shape": list(m.shape),
            "offset": m.extent.offset,
            "bytes": m.extent.nbytes,
        }
        for m in cls.matrices
    ]
    return {"bytes": cls.nbytes, "matrices": matrices}


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    return {
        "path": layer.path,
        "top_k": layer.top_k,
        "record_class": layer.record_class,
        "records": [f"{r.shard}:{r.offset}:{_hex(r.checksum)}" for r in layer.records],
    }


def _parse(document: dict[str, Any]) -> Manifest:
    return Manifest(
        tool=str(document["tool"]),
        model_id=str(document["model_id"]),
        architecture=str(document["architecture"]),
        fingerprint=str(document["fingerprint"]),
        classes=tuple(_parse_class(entry) for entry in document["record_classes"]),
        layers=tuple(_parse_layer(entry) for entry in document["layers"]),
        residents=tuple(_parse_resident(entry) for entry in document["resident"]),
        shards=tuple(
            Shard(str(s["name"]), int(s["bytes"]), int(s["header"]), int(s["xxh3"], 16))
            for s in document["shards"]
        ),
    )


def _parse_class(entry: dict[str, Any]) -> RecordClass:
    matrices = tuple(
        Matrix(
            str(m["name"]),
            str(m["codec"]),
            tuple(int(n) for n in m["shape"]),
            Extent(int(m["offset"]), int(m["bytes"])),
        )
        for m in entry["matrices"]
    )
    return RecordClass(int(entry["bytes"]), matrices)


def _parse_layer(entry: dict[str, Any]) -> Layer:
    records = []
    for text in entry["records"]:
        shard, offset, checksum = text.split(":")
        records.append(Record(int(shard), int(offset), int(checksum, 16)))
    return Layer(
        str(entry["path"]), int(entry["top_k"]), int(entry["record_class"]), tuple(records)
    )


def _parse_resident(entry: dict[str, Any]) -> Resident:
    return Resident(
        name=str(entry["name"]),
        shard=int(entry["shard"]),
        dtype=str(entry["dtype"]),
        shape=tuple(int(n) for n in entry["shape"]),
        extent=Extent(int(entry["offset"]), int(entry["bytes"])),
        checksum=int(entry["xxh3"], 16),
        inputs=str(entry["inputs"]) if "inputs" in entry else None,
    )
