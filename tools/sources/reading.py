"""Tensor bytes from the files of a checkpoint, read with `pread` in pieces, never mapped.

A mapped source would be counted as the process's own memory and could end it with SIGBUS when a
file is truncated under it; `pread` gives a short read, which is an error with a name.
"""

import os
import sys
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_64, xxh3_128

from tierrun.io.direct import read_fully
from tierrun.io.errors import CheckpointError
from tierrun.io.extent import Extent

_SAMPLES = 16
_SAMPLE_BYTES = 4096


def read_elements(
    shape: tuple[int, ...], row: int | None, elements: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """A tensor of `shape`, or of its first dimension only `row` ([1, …]), from its `elements`."""
    if row is None:
        return elements(0, prod(shape)).view(shape)
    count = prod(shape[1:])
    return elements(row * count, (row + 1) * count).view(1, *shape[1:])


class Files:
    """Files that are opened when first read; used by one thread at a time until `close`."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, path: Path, name: str, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of tensor `name`, uint8 [nbytes] in fresh memory.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        data = torch.empty(nbytes, dtype=torch.uint8)
        try:
            descriptor = self._descriptor(path)
            read_fully(descriptor, offset, memoryview(data.numpy().data))
        except OSError as error:
            raise CheckpointError(f"{path}: reading {name} failed: {error.strerror}") from error
        if sys.platform == "linux":  # read once: leave the page cache to those who read again
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return data

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[path]

    def sample(self, path: Path, extent: Extent) -> bytes:
        """A hash of a page in the middle of `extent`."""
        middle = extent.offset + extent.nbytes // 2
        length = min(_SAMPLE_BYTES, extent.end - middle)
        return xxh3_64(os.pread(self._descriptor(path), length, middle)).digest()


def fingerprint(config: bytes, tensors: Mapping[str, tuple[Path, Any]], files: Files) -> str:
    """A hash that differs for different checkpoints without reading them whole.

    Over the configuration, every header (the tensors' named tuples, each with an `extent`) and a
    few pages of each file, so that a fine-tune with the shapes of its base is told apart from it.
    """
    digest = xxh3_128(config)
    by_file: dict[Path, list[str]] = {}
    for name, (path, _) in tensors.items():
        by_file.setdefault(path, []).append(name)
    for path, names in sorted(by_file.items()):
        header = [(name, *tensors[name][1]) for name in names]
        digest.update(f"{path.name} {path.stat().st_size} {header}".encode())
        for name in names[:: -(-len(names) // _SAMPLES)]:
            digest.update(files.sample(path, tensors[name][1].extent))
    return digest.hexdigest()
