"""The units of a conversion: what is written, hashed and journaled as one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tierrun.io.store import Manifest, RecordClass
from tierrun.tools.blueprint import Blueprint, LayerRecipe
from tierrun.tools.pieces import padding
from tierrun.tools.sources.source import Source


class Item(NamedTuple):
    """What is written and journaled as one: a record or a resident weight, in pieces."""

    shard: int
    offset: int
    nbytes: int
    pieces: Callable[[Source], Iterator[torch.Tensor]]


def list_items(blueprint: Blueprint, manifest: Manifest) -> list[Item]:
    """All that is written: resident weights in the manifest's order, then records by layer."""
    recipes = {recipe.name: recipe for recipe in blueprint.residents}
    items = [
        Item(entry.shard, *entry.extent, recipes[entry.name].pieces) for entry in manifest.residents
    ]
    for recipe, layer in zip(blueprint.layers, manifest.layers, strict=True):
        cls = manifest.classes[layer.record_class]
        for expert, record in enumerate(layer.records):
            pieces = _record_pieces(recipe, cls, expert)
            items.append(Item(record.shard, record.offset, cls.nbytes, pieces))
    return items


def _record_pieces(
    recipe: LayerRecipe, cls: RecordClass, expert: int
) -> Callable[[Source], Iterator[torch.Tensor]]:
    def pieces(source: Source) -> Iterator[torch.Tensor]:
        end = 0
        for matrix, made in zip(cls.matrices, recipe.matrices, strict=True):
            yield from padding(matrix.extent.offset - end)
            yield made.make(source, expert)
            end = matrix.extent.end
        yield from padding(cls.nbytes - end)

    return pieces


def trusted(
    done: Mapping[int, int], items: Sequence[Item], paths: Sequence[Path]
) -> dict[int, int]:
    """Of the journaled items those whose shard is still there."""
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    return {
        index: checksum
        for index, checksum in done.items()
        if sizes[items[index].shard] >= items[index].offset + items[index].nbytes
    }


def with_checksums(manifest: Manifest, checksums: Sequence[int]) -> Manifest:
    """`manifest` with the checksums of its items, in the order of `list_items`."""
    remaining = iter(checksums)
    residents = tuple(replace(entry, checksum=next(remaining)) for entry in manifest.residents)
    layers = tuple(
        replace(
            layer,
            records=tuple(record._replace(checksum=next(remaining)) for record in layer.records),
        )
        for layer in manifest.layers
    )
    return replace(manifest, residents=residents, layers=layers)
