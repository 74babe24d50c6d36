"""A Hugging Face checkpoint in safetensors files, read with `pread` in pieces, never mapped.

A mapped source would be counted as the process's own memory and could end it with SIGBUS when a
file is truncated under it; `pread` gives a short read, which is an error with a name.
"""

import os
import sys
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from xxhash import xxh3_64, xxh3_128

from tierrun.engine.codecs.dense import SAFETENSORS_DTYPES
from tierrun.io.direct import read_fully
from tierrun.io.errors import CheckpointError
from tierrun.io.header import TensorInfo, read_header
from tierrun.tools.sources.files import check_index, read_json, refuse_quantised, weight_files

_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(slots=True)
class Checkpoint:
    """An opened checkpoint: `config` as its config.json says, `tensors` by name with their file.

    `read` may be called by one thread at a time. `close` (or `with`) closes the files.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[Path, TensorInfo]]
    _files: dict[Path, int] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the configuration and every header of the checkpoint in `directory`.

        Raises:
            CheckpointError: no such directory, no weights, a shard missing, or a quantised one.
            CorruptError: a header that contradicts its file.
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        config = read_json(directory / "config.json")
        refuse_quantised(directory, config)
        tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for path in weight_files(directory):
            tensors |= {name: (path, info) for name, info in _header(path).items()}
        check_index(directory, tensors)
        return cls(directory, config, tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def info(self, name: str) -> TensorInfo:
        return self.tensors[name][1]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor `name`.

        Raises:
            CheckpointError: a dtype that torch does not have.
        """
        path, info = self.tensors[name]
        if info.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {info.dtype}")
        return SAFETENSORS_DTYPES[info.dtype]

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Tensor `name` in fresh memory, or of its first dimension only `row` ([1, …]).

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        shape = self.info(name).shape
        if row is None:
            return self.elements(name, 0, prod(shape)).view(shape)
        count = prod(shape[1:])
        return self.elements(name, row * count, (row + 1) * count).view(1, *shape[1:])

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of tensor `name`, counted in memory order ([stop - start])."""
        path, info = self.tensors[name]
        dtype = self.dtype(name)
        data = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        offset = info.extent.offset + start * dtype.itemsize
        self._fill(path, name, memoryview(data.numpy().data), offset)
        return data.view(dtype)

    def _fill(self, path: Path, name: str, buffer: memoryview, offset: int) -> None:
        try:
            descriptor = self._descriptor(path)
            read_fully(descriptor, offset, buffer)
        except OSError as error:
            raise CheckpointError(f"{path}: reading {name} failed: {error.strerror}") from error
        if sys.platform == "linux":  # read once: leave the page cache to those who read again
            os.posix_fadvise(descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def fingerprint(self) -> str:
        """A hash that differs for different checkpoints without reading them whole.

        Over config.json, every header and a few pages of each file, so that a fine-tune with the
        shapes of its base is told apart from it.
        """
        digest = xxh3_128((self.directory / "config.json").read_bytes())
        by_file: dict[Path, list[str]] = {}
        for name, (path, _) in self.tensors.items():
            by_file.setdefault(path, []).append(name)
        for path, names in sorted(by_file.items()):
            header = [(name, *self.info(name)) for name in names]
            digest.update(f"{path.name} {path.stat().st_size} {header}".encode())
            for name in names[:: -(-len(names) // _SAMPLES)]:
                digest.update(self._sample(name))
        return digest.hexdigest()

    def _sample(self, name: str) -> bytes:
        path, info = self.tensors[name]
        middle = info.extent.offset + info.extent.nbytes // 2
        length = min(_SAMPLE_BYTES, info.extent.end - middle)
        return xxh3_64(os.pread(self._descriptor(path), length, middle)).digest()


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
