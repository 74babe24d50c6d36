"""A Hugging Face checkpoint in safetensors files, read with `pread` in pieces, never mapped.

A mapped source would be counted as the process's own memory and could end it with SIGBUS when a
file is truncated under it; `pread` gives a short read, which is an error with a name.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from xxhash import xxh3_64, xxh3_128

from tierrun.io.errors import CheckpointError
from tierrun.io.header import TensorInfo, read_header

log = logging.getLogger(__name__)

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64, "U64": torch.uint64,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""safetensors' dtype names and torch's."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_NUMBERED = re.compile(r"^(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors$")
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
        config = _read_json(directory / "config.json")
        _refuse_quantised(directory, config)
        tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for path in _weight_files(directory):
            tensors |= {name: (path, info) for name, info in _header(path).items()}
        _check_index(directory, tensors)
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
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {info.dtype}")
        return TORCH_DTYPES[info.dtype]

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
        descriptor = self._descriptor(path)
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{path} ends inside tensor {name}; download it again")
                done += count
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; is it a Hugging Face checkpoint?"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return document


def _refuse_quantised(directory: Path, config: dict[str, Any]) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        quantisation = part.get("quantization_config")
        if quantisation:
            method = quantisation.get("quant_method", "unknown method")
            raise CheckpointError(
                f"{directory} is a quantised checkpoint ({method}): not supported yet; "
                "use the bf16 one"
            )


def _weight_files(directory: Path) -> list[Path]:
    """The weight files as transformers chooses them: one file, an index, or what is there."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        return [_existing(directory / name, f"named in {index.name}") for name in names]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise CheckpointError(_no_weights(directory))
    for path in found:
        _check_siblings(path)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it")
    return weight_map


def _existing(path: Path, why: str) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing ({why}); download the checkpoint again")
    return path


def _check_siblings(path: Path) -> None:
    match = _NUMBERED.match(path.name)
    for number in range(1, int(match["count"]) + 1 if match else 0):
        assert match is not None
        sibling = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
        _existing(path.parent / sibling, f"a sibling of {path.name}")


def _no_weights(directory: Path) -> str:
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if any(directory.glob(pattern)):
            return (
                f"{directory} has only {pattern} weights, which can run code when opened; load it "
                "with transformers and save_pretrained() it as safetensors first"
            )
    return f"{directory} has no *.safetensors files; is the download complete?"


def _check_index(directory: Path, tensors: Iterable[str]) -> None:
    """Every tensor that the index promises must be in a file (a stale shard has others)."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file() or (directory / "model.safetensors").is_file():
        return
    present = set(tensors)
    for name, file in _weight_map(index).items():
        if name not in present:
            raise CheckpointError(
                f"tensor {name} is missing: {index.name} says it is in {file}; download it again"
            )


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
