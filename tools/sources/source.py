"""What conversion asks of a checkpoint, whatever files it lies in."""

from dataclasses import dataclass
from typing import Protocol

import torch

from tierrun.tools.sources.packing import PackedSource


class Reads(Protocol):
    """Tensors by name, whole or only one row [1, …] of their first dimension."""

    def read(self, name: str, row: int | None = None) -> torch.Tensor: ...


class Source(Reads, PackedSource, Protocol):
    """Tensors by name, read in pieces; those that are packed have the dtype fp32.

    `lossy` are tensors that can be read as numbers only and must be quantised anew.
    """

    @property
    def lossy(self) -> frozenset[str]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop`, in memory order, of a tensor that is not packed."""
        ...


@dataclass(frozen=True, slots=True)
class Shadow:
    """`source` without its bytes: the same answers on the meta device."""

    source: Source

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        shape = self.shape(name) if row is None else (1, *self.shape(name)[1:])
        return torch.empty(shape, dtype=self.dtype(name), device="meta")
