"""What a store holds, as a table and as data."""

from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from tierrun.io.extent import format_bytes
from tierrun.io.store import Store


def listing(store: Store) -> RenderableType:
    """Tables of the model, its record classes and its shards."""
    return Group(_summary(store), _classes(store), _shards(store))


def as_json(store: Store) -> dict[str, Any]:
    """The same for programs; sizes in bytes."""
    manifest = store.manifest
    return {
        "model_id": manifest.model_id,
        "architecture": manifest.architecture,
        "tool": manifest.tool,
        "fingerprint": manifest.fingerprint,
        "num_layers": len(manifest.layers),
        "num_experts": manifest.num_experts,
        "experts_per_layer": sorted({len(layer.records) for layer in manifest.layers}),
        "top_k": sorted({layer.top_k for layer in manifest.layers}),
        "expert_bytes": manifest.expert_bytes,
        "resident_bytes": manifest.resident_bytes,
        "resident_bytes_by_codec": _resident_bytes(store),
        "record_classes": [
            {
                "bytes": cls.nbytes,
                "codecs": sorted({matrix.codec for matrix in cls.matrices}),
                "matrices": [
                    {"name": m.name, "codec": m.codec, "shape": list(m.shape)} for m in cls.matrices
                ],
                "num_records": count,
            }
            for cls, count in zip(manifest.classes, _counts(store), strict=True)
        ],
        "shards": [
            {"name": shard.name, "directory": str(path.parent), "bytes": shard.nbytes}
            for shard, path in zip(manifest.shards, store.shard_paths, strict=True)
        ],
    }


def _summary(store: Store) -> Table:
    manifest = store.manifest
    rows = {
        "model": manifest.model_id,
        "architecture": manifest.architecture,
        "MoE layers": str(len(manifest.layers)),
        "experts per layer": _span(len(layer.records) for layer in manifest.layers),
        "experts per token": _span(layer.top_k for layer in manifest.layers),
        "experts": f"{manifest.num_experts} records, {format_bytes(manifest.expert_bytes)}",
        "resident": f"{len(manifest.residents)} weights, {format_bytes(manifest.resident_bytes)} "
        f"({', '.join(f'{n} {format_bytes(b)}' for n, b in _resident_bytes(store).items())})",
        "made by": manifest.tool,
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _classes(store: Store) -> Table:
    table = Table("record class", "bytes", "matrices", "records", "bits per weight", box=None)
    for index, cls in enumerate(store.manifest.classes):
        matrices = ", ".join(f"{m.name} {m.codec} {list(m.shape)}" for m in cls.matrices)
        bits = 8 * cls.nbytes / sum(prod(matrix.shape) for matrix in cls.matrices)
        count = str(_counts(store)[index])
        table.add_row(str(index), format_bytes(cls.nbytes), matrices, count, f"{bits:.2f}")
    return table


def _shards(store: Store) -> Table:
    table = Table("directory", "shards", "bytes", box=None)
    count: Counter[Path] = Counter()
    nbytes: Counter[Path] = Counter()
    for shard, path in zip(store.manifest.shards, store.shard_paths, strict=True):
        count[path.parent] += 1
        nbytes[path.parent] += shard.nbytes
    for directory, shards in count.items():
        table.add_row(str(directory), str(shards), format_bytes(nbytes[directory]))
    return table


def _counts(store: Store) -> list[int]:
    """Records in each class."""
    counts = [0] * len(store.manifest.classes)
    for layer in store.manifest.layers:
        counts[layer.record_class] += len(layer.records)
    return counts


def _resident_bytes(store: Store) -> dict[str, int]:
    """Bytes of the resident weights by dtype or codec, most first."""
    nbytes: Counter[str] = Counter()
    for resident in store.manifest.residents:
        nbytes[resident.dtype.lower()] += resident.extent.nbytes
    return dict(nbytes.most_common())


def _span(numbers: Iterable[int]) -> str:
    values = sorted(numbers)
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
