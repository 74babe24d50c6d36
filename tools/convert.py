"""From a checkpoint to a store, record by record; a killed conversion continues."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from xxhash import xxh3_128_hexdigest

import tierrun
from tierrun.engine.architecture import build_meta, read_config
from tierrun.io.errors import UsageError
from tierrun.io.store import Manifest
from tierrun.tools.blueprint import Blueprint, draw
from tierrun.tools.choices import Quantising
from tierrun.tools.disk import check_space, disk_errors, shard_paths
from tierrun.tools.items import Item, list_items, trusted, with_checksums
from tierrun.tools.journal import Journal
from tierrun.tools.layout import SHARD_BYTES, Identity, Layout, lay_out
from tierrun.tools.precision import Precision, parse_dtype
from tierrun.tools.sources.checkpoint import ModelSource
from tierrun.tools.sources.opening import open_source
from tierrun.tools.target import claimed, copy_model_files, finished_store, publish
from tierrun.tools.writer import ShardWriter

log = logging.getLogger(__name__)

Directories = Path | str | Sequence[Path | str]


class Progress(Protocol):
    """Told how many bytes of the store are written, and how many there will be."""

    def __call__(self, done: int, total: int, /) -> None: ...


def convert(
    src: Path | str,
    nvme_dir: Directories,
    *,
    config: Path | str | None = None,
    tokenizer: Path | str | None = None,
    dtype: str | None = None,
    quant: str | None = None,
    quant_resident: str | None = None,
    requant: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Make a store of the checkpoint `src` in `nvme_dir`.

    `src` is a directory, a .gguf file (one piece of a split one will do), or a hub id, with
    `:quantisation` for a repository of GGUF files. `config` and `tokenizer` (directories or hub
    ids) stand in for what a GGUF says of itself.

    Several directories share the experts; the first holds everything else. An interrupted
    conversion is continued by the same call; a finished one is left as it is. `dtype` (bf16, f16,
    f32) converts floating-point weights, `force` replaces what the directories hold.

    What is quantised stays so. `quant` and `quant_resident` (q8_0, q4_0, mxfp4) quantise what is
    not, of the experts and of the rest; `requant` quantises anew, with loss, what is of a type that
    has no codec.

    Raises:
        CheckpointError, ModelError: the source cannot be converted.
        UsageError: the directories cannot be written or hold something else, or there is nothing
            to quantise.
        DiskFullError: no room; make some and call again.
    """
    directories = _directories(nvme_dir)
    asked, quantising = parse_dtype(dtype), Quantising.parse(quant, quant_resident, requant)
    with open_source(
        src, config=config, tokenizer=tokenizer, requant=requant is not None
    ) as checkpoint:
        blueprint, layout = plan(checkpoint, len(directories), asked, shard_bytes, quantising)
        manifest = None if force else finished_store(directories, layout.manifest)
        if manifest is not None:
            log.info("%s is already converted", directories[0])
            return manifest
        with claimed(directories, force=force) as journal:
            return _write(checkpoint, blueprint, layout, directories, journal, progress)


def plan(
    checkpoint: ModelSource,
    num_directories: int,
    asked: torch.dtype | None,
    shard_bytes: int,
    quantising: Quantising,
) -> tuple[Blueprint, Layout]:
    """What becomes of `checkpoint` and where it goes; reads headers only."""
    model = build_meta(read_config(checkpoint.directory))
    mapping, precision = checkpoint.mapping(model), Precision.of(model, asked)
    blueprint = draw(model, mapping, checkpoint, precision, quantising)
    tool, kind = f"tierrun {tierrun.__version__}", model.config.model_type
    identity = Identity(tool, checkpoint.model_id, kind, checkpoint.fingerprint())
    return blueprint, lay_out(blueprint, identity, num_directories, shard_bytes)


def _directories(nvme_dir: Directories) -> tuple[Path, ...]:
    several = [nvme_dir] if isinstance(nvme_dir, Path | str) else nvme_dir
    directories = tuple(Path(directory) for directory in several)
    if not directories:
        raise UsageError("no directory to write to; name one with --nvme-dir")
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise UsageError("a directory is named twice with --nvme-dir")
    return directories


def _write(
    checkpoint: ModelSource,
    blueprint: Blueprint,
    layout: Layout,
    directories: Sequence[Path],
    journal: Journal,
    progress: Progress | None,
) -> Manifest:
    with disk_errors(layout, directories):
        check_space(layout, directories)
        items = list_items(blueprint, layout.manifest)
        done = trusted(journal.resume(_plan_id(layout)), items, shard_paths(layout, directories))
        writer = ShardWriter(layout, directories, journal)
        try:
            _write_items(items, done, checkpoint, writer, progress)
        finally:
            writer.close()
        checksums = [(done | writer.checksums)[index] for index in range(len(items))]
        manifest = with_checksums(layout.manifest, checksums)
        copy_model_files(checkpoint.directory, directories[0])
        publish(manifest, directories)
        journal.remove()
    _report_errors(blueprint, resumed=bool(done))
    return manifest


def _report_errors(blueprint: Blueprint, *, resumed: bool) -> None:
    parts = list(blueprint.choices.errors())
    if parts:
        over = " (what this run quantised)" if resumed else ""
        log.info("relative rms error left by quantising%s: %s", over, ", ".join(parts))


def _write_items(
    items: Sequence[Item],
    done: Mapping[int, int],
    source: ModelSource,
    writer: ShardWriter,
    progress: Progress | None,
) -> None:
    total = sum(item.nbytes for item in items)
    written = sum(items[index].nbytes for index in done)
    for index, item in enumerate(items):
        if index in done:
            continue
        offset = item.offset
        for piece in item.pieces(source):
            writer.write(item.shard, offset, piece)
            offset += piece.nbytes
            written += piece.nbytes
            if progress is not None:
                progress(written, total)
        writer.finish(index)
    writer.flush()


def _plan_id(layout: Layout) -> str:
    return xxh3_128_hexdigest(json.dumps([layout.manifest.to_json(), layout.homes]).encode())
