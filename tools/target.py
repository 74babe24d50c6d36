"""The directories that a store is written to: what lies there already, and making it a store."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tierrun.io.errors import UsageError
from tierrun.io.store import MANIFEST, MODEL_DIR, Manifest, Store, read_manifest
from tierrun.tools.disk import unwritable
from tierrun.tools.journal import JOURNAL, Journal
from tierrun.tools.sources.files import model_files

_SHARD = re.compile(r"^(experts|resident)-\d{5}-of-\d{5}\.safetensors$")


def finished_store(directories: Sequence[Path], wanted: Manifest) -> Manifest | None:
    """The manifest of the store in `directories` if it is what `wanted` (unwritten) describes.

    Raises:
        UsageError: a store of something else.
        StoreError: the right store, but damaged.
    """
    if not (directories[0] / MANIFEST).is_file():
        return None
    manifest = read_manifest(directories[0])
    if _without_checksums(manifest) != replace(wanted, tool=manifest.tool):
        raise UsageError(
            f"{directories[0]} already holds a store ({manifest.model_id}, made from something "
            "else or in another way); choose another directory, or use --force to replace it"
        )
    store = Store.open(directories)
    (directories[0] / JOURNAL).unlink(missing_ok=True)  # killed between the two last steps
    return store.manifest


def _without_checksums(manifest: Manifest) -> Manifest:
    layers = tuple(
        replace(layer, records=tuple(record._replace(checksum=0) for record in layer.records))
        for layer in manifest.layers
    )
    residents = tuple(replace(resident, checksum=0) for resident in manifest.residents)
    return replace(manifest, layers=layers, residents=residents)


@contextmanager
def claimed(directories: Sequence[Path], *, force: bool) -> Iterator[Journal]:
    """The locked journal of a conversion into `directories`, which exist and are clear for it.

    Raises:
        UsageError: a directory cannot be written, is being written by another conversion, or holds
            something else (which `force` removes).
    """
    try:
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
        journal = Journal(directories[0])
    except OSError as error:
        raise unwritable(directories[0], error) from None
    try:
        if force:
            _clear(directories, journal)
        _check_clear(directories, journal)
        yield journal
    finally:
        journal.close()


def _clear(directories: Sequence[Path], journal: Journal) -> None:
    """Remove a store or the beginnings of one; the manifest first, so that it never lies."""
    is_ours = (directories[0] / MANIFEST).exists() or not journal.is_empty
    (directories[0] / MANIFEST).unlink(missing_ok=True)
    journal.clear()
    for path in _shards_in(directories):
        path.unlink()
    if is_ours:
        shutil.rmtree(directories[0] / MODEL_DIR, ignore_errors=True)


def _check_clear(directories: Sequence[Path], journal: Journal) -> None:
    for directory in directories[1:]:
        if (directory / MANIFEST).exists() or (directory / JOURNAL).exists():
            raise UsageError(f"{directory} belongs to another store; choose another directory")
    if (directories[0] / MANIFEST).exists():
        raise UsageError(f"another conversion into {directories[0]} just ended; try again")
    if not journal.is_empty:
        return
    for path in _shards_in(directories):
        raise UsageError(
            f"{path} exists already, of another store perhaps; choose another directory, or use "
            "--force to remove the shards there"
        )


def _shards_in(directories: Sequence[Path]) -> list[Path]:
    found = (path for directory in directories for path in sorted(directory.iterdir()))
    return [path for path in found if _SHARD.match(path.name)]


def copy_model_files(source: Path, root: Path) -> None:
    """Configuration, tokenizer and chat template of `source`, byte for byte, into the store."""
    for path in model_files(source):
        copy = root / MODEL_DIR / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        sync(copy)
    sync(root / MODEL_DIR)


def publish(manifest: Manifest, directories: Sequence[Path]) -> None:
    """Make the directories a store, at once: the manifest appears by rename, when all is synced."""
    temporary = directories[0] / f"{MANIFEST}.tmp"
    temporary.write_text(manifest.to_json())
    sync(temporary)
    for directory in directories:
        sync(directory)
    os.replace(temporary, directories[0] / MANIFEST)
    sync(directories[0])


def sync(path: Path) -> None:
    """Put the file or directory at `path` on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
