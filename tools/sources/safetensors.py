"""A Hugging Face checkpoint in safetensors files."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from tierrun.engine.codecs.dense import SAFETENSORS_DTYPES
from tierrun.engine.codecs.planes import Fields
from tierrun.io.errors import CheckpointError
from tierrun.io.header import TensorInfo, read_header
from tierrun.tools.mapping import Mapping, map_names
from tierrun.tools.sources.files import check_index, read_json, weight_files
from tierrun.tools.sources.packing import Packing
from tierrun.tools.sources.reading import Files, fingerprint, read_elements


@dataclass(slots=True)
class Checkpoint:
    """An opened checkpoint: `config` as its config.json says, `tensors` by name with their file.

    `name` is what it goes by where its configuration does not say. `read` may be called by one
    thread at a time. `close` (or `with`) closes the files.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    tensors: dict[str, tuple[Path, TensorInfo]]
    _files: Files = field(default_factory=Files)

    @classmethod
    def open(cls, directory: Path, name: str | None = None) -> Self:
        """Read the configuration and every header of the checkpoint in `directory`.

        Raises:
            CheckpointError: no such directory, no weights, or a shard missing.
            CorruptError: a header that contradicts its file.
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        config = read_json(directory / "config.json")
        tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for path in weight_files(directory):
            tensors |= {name: (path, info) for name, info in _header(path).items()}
        check_index(directory, tensors)
        return cls(directory, name or directory.resolve().name, config, tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    @property
    def model_id(self) -> str:
        """The id in config.json unless it is somebody's path, else the name of the source."""
        recorded = self.config.get("_name_or_path")
        if isinstance(recorded, str) and recorded and not recorded.startswith((".", "/", "~")):
            return recorded
        return self.name

    def mapping(self, model: PreTrainedModel) -> Mapping:
        return map_names(model, self.tensors, str(self.config.get("model_type")))

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

    @property
    def lossy(self) -> frozenset[str]:
        return frozenset()

    def packing(self, name: str) -> Packing | None:
        return None

    def fields(self, name: str, start: int, stop: int) -> Fields:
        raise AssertionError(f"{name} holds plain numbers")

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Tensor `name` in fresh memory, or of its first dimension only `row` ([1, …]).

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        return read_elements(self.shape(name), row, partial(self.elements, name))

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of tensor `name`, counted in memory order ([stop - start])."""
        path, info = self.tensors[name]
        dtype = self.dtype(name)
        offset = info.extent.offset + start * dtype.itemsize
        data = self._files.read(path, name, offset, (stop - start) * dtype.itemsize)
        return data.view(dtype)

    def fingerprint(self) -> str:
        config = (self.directory / "config.json").read_bytes()
        return fingerprint(config, self.tensors, self._files)


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
