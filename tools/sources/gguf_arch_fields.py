"""A GGUF file's metadata and shapes, read with a type and bounds: what is wrong is named."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierrun.io.errors import CheckpointError

LIMIT = 1 << 24
"""No count in a model's metadata is larger; the vocabulary is counted in the file itself."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Fields:
    """Metadata keys below `<architecture>.` and tensors by name (shapes as torch has them).

    Every method raises CheckpointError, with the key, for what is missing without a default, of
    another type, or out of bounds.
    """

    metadata: Mapping[str, Any]
    shapes: Shapes
    architecture: str
    rope_freqs: Sequence[float] | None = None

    def has(self, key: str) -> bool:
        return self._full(key) in self.metadata

    def count(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = LIMIT
    ) -> int:
        """An integer in [low, high]."""
        value = self._get(key, default)
        if not isinstance(value, int) or not _is_count(value, low, high):
            raise self._wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; the shortest that has the file's 32 bits, as the original wrote it."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, float | int) or not _fits(value):
            raise self._wrong(key, "a finite number")
        return float(str(np.float32(value)))

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self._wrong(key, "a number above 0")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def counts(self, key: str, length: int, *, low: int = 1) -> list[int]:
        """One integer for each of `length` layers, or the same one for all."""
        value = self._get(key, None)
        values = value if isinstance(value, list) else [value] * length
        if len(values) < length or not all(_is_count(one, low) for one in values):
            raise self._wrong(key, f"a whole number from {low} on for each of {length} layers")
        return values[:length]

    def flags(self, key: str, length: int) -> list[bool]:
        """Whether something is so, for each of `length` layers."""
        value = self._get(key, None)
        values = value if isinstance(value, list) else []
        if len(values) < length or not all(isinstance(one, bool) for one in values):
            raise self._wrong(key, f"true or false for each of {length} layers")
        return values[:length]

    def shape(self, tensor: str, dimensions: int) -> tuple[int, ...]:
        shape = self.shapes.get(tensor)
        if shape is None:
            raise CheckpointError(f"tensor {tensor} is missing; is a part of the file?")
        if len(shape) != dimensions:
            raise CheckpointError(
                f"tensor {tensor} has shape {list(shape)}, wanted {dimensions} dimensions; "
                "download the file again"
            )
        return shape

    def wrong(self, key: str, why: str) -> CheckpointError:
        """The error for a value that cannot be used; `why` ends the sentence."""
        return CheckpointError(f"metadata {self._full(key)} is {self._shown(key)}: {why}")

    def _full(self, key: str) -> str:
        return key if key.startswith(("general.", "tokenizer.")) else f"{self.architecture}.{key}"

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self._full(key), default)
        if value is None:
            raise CheckpointError(
                f"metadata {self._full(key)} is missing; give the configuration with "
                "--config HF_DIR_OR_ID"
            )
        return value

    def _wrong(self, key: str, wanted: str) -> CheckpointError:
        return self.wrong(key, f"wanted {wanted}; download the file again")

    def _shown(self, key: str) -> str:
        text = repr(self.metadata.get(self._full(key)))
        return text if len(text) <= 60 else f"{text[:60]}…"


def blocks(shapes: Shapes) -> set[int]:
    """The numbers of the blocks that have tensors."""
    return {int(match[1]) for name in shapes if (match := re.match(r"blk\.(\d{1,9})\.", name))}


def _fits(value: float) -> bool:
    """Whether fp32 holds it: NaN compares false with everything."""
    return abs(value) < 3e38


def _is_count(value: Any, low: int, high: int = LIMIT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
