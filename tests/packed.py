"""A checkpoint that says its tensors are packed, with random parts, and the same as numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Self
from zlib import crc32

import torch
from tests.codecs import random_fields
from transformers import PreTrainedModel

from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.expand import dequantise
from tierrun.engine.codecs.planes import Fields
from tierrun.tools.gathering import map_fields
from tierrun.tools.mapping import Mapping
from tierrun.tools.sources.packing import Packing
from tierrun.tools.sources.safetensors import Checkpoint

Kinds = Callable[[str], tuple[str, int] | None]


@dataclass(slots=True)
class PackedCheckpoint:
    """The checkpoint in `directory` with random contents where `kinds` names a codec and an axis.

    With `as_numbers` the same contents are told as fp32, and nothing is packed.
    """

    plain: Checkpoint
    kinds: Kinds
    as_numbers: bool = False
    lossy: frozenset[str] = frozenset()
    _made: dict[str, Fields] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, kinds: Kinds, *, as_numbers: bool = False) -> Self:
        return cls(Checkpoint.open(directory), kinds, as_numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.plain.close()

    @property
    def directory(self) -> Path:
        return self.plain.directory

    @property
    def model_id(self) -> str:
        return "packed"

    def fingerprint(self) -> str:
        return self.plain.fingerprint()

    def mapping(self, model: PreTrainedModel) -> Mapping:
        return self.plain.mapping(model)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.plain.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self.kinds(name) else self.plain.dtype(name)

    def packing(self, name: str) -> Packing | None:
        kind = self.kinds(name)
        return None if self.as_numbers or kind is None else Packing(find_codec(kind[0]), kind[1])

    def fields(self, name: str, start: int, stop: int) -> Fields:
        return map_fields(lambda part: part[start:stop], self._all(name))

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        kind = self.kinds(name)
        if kind is None:
            return self.plain.read(name, row)
        values = dequantise(find_codec(kind[0]), self._all(name))
        shape = [n for dim, n in enumerate(self.shape(name)) if dim != kind[1]]
        whole = values.view(*shape, -1).movedim(-1, kind[1]).contiguous()
        return whole if row is None else whole[row : row + 1]

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        if self.kinds(name) is None:
            return self.plain.elements(name, start, stop)
        return self.read(name).flatten()[start:stop]

    def _all(self, name: str) -> Fields:
        if name not in self._made:
            kind = self.kinds(name)
            assert kind is not None
            columns = self.shape(name)[kind[1]]
            rows = prod(self.shape(name)) // columns
            fields = random_fields(find_codec(kind[0]), rows, columns, crc32(name.encode()))
            self._made[name] = fields
        return self._made[name]
