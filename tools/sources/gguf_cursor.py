"""Reading typed values one after the other from a GGUF header, a chunk of the file at a time."""

import os
import struct
from pathlib import Path
from typing import Any

from tierrun.io.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Six times the largest vocabulary published."""

MAX_ELEMENTS = 1 << 22
"""Of all arrays of a header together: three vocabularies of 300,000 tokens with their merges."""

MAX_NAME_BYTES = 1 << 16
"""llama.cpp's own bound on a key; tensors have far shorter names."""

_CHUNK_BYTES = 1 << 20
_STRING, _ARRAY = 8, 9
_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""GGUF's numbers for types of numbers → struct's letters; strings and arrays are read apart."""


class Cursor:
    """A place in the header of the open file `descriptor`; every read moves it on.

    Everything raises CheckpointError where the file or a bound ends before the value does.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.size = os.fstat(descriptor).st_size
        self._chunk, self._start, self._at = b"", 0, 0
        self._elements = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    def take(self, nbytes: int, what: str) -> bytes:
        """The next `nbytes` bytes."""
        end = self._at + nbytes
        if end > len(self._chunk):
            self._refill(nbytes, what)
            end = nbytes
        data = self._chunk[self._at : end]
        self._at = end
        return data

    def _refill(self, nbytes: int, what: str) -> None:
        """Begin the chunk at the current place, with at least `nbytes` in it."""
        start = self.position
        if start + nbytes > min(self.size, MAX_HEADER_BYTES):
            raise self._too_long(nbytes, what)
        length = min(max(nbytes, _CHUNK_BYTES), self.size - start)
        self._chunk, self._start, self._at = os.pread(self._descriptor, length, start), start, 0
        if len(self._chunk) < nbytes:
            raise self._too_long(nbytes, what)

    def _too_long(self, nbytes: int, what: str) -> CheckpointError:
        if self.position + nbytes > self.size:
            return CheckpointError(
                f"{self.path} is truncated: {what} wants {nbytes} bytes, the file has "
                f"{self.size - self.position} left; download it again"
            )
        return CheckpointError(
            f"{self.path}: the header is longer than {MAX_HEADER_BYTES} bytes at {what}; "
            "download it again"
        )

    def number(self, letter: str, what: str) -> Any:
        """A number of struct's type `letter`."""
        layout = "<" + letter
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout), what))
        return value

    def count(self, what: str, least_bytes: int, most: int) -> int:
        """How many things of at least `least_bytes` each follow, `most` at most."""
        count: int = self.number("Q", f"the number of {what}")
        if count > most or count * least_bytes > self.size - self.position:
            raise CheckpointError(
                f"{self.path}: {count} {what} in a file of {self.size} bytes; download it again"
            )
        return count

    def name(self, what: str) -> str:
        """A string that names something: not empty, short, and text."""
        length = self.count(f"bytes in the name of {what}", 1, MAX_NAME_BYTES)
        try:
            text = self.take(length, f"the name of {what}").decode()
        except UnicodeDecodeError:
            text = ""
        if not text.isprintable() or not text:
            raise CheckpointError(f"{self.path}: the name of {what} is not text; download it again")
        return text

    def value(self, key: str) -> Any:
        """A type and a value of it: a number, bool, string, or list of one kind of these."""
        kind = self.number("I", f"the type of {key}")
        if kind == _ARRAY:
            return self._array(key)
        if kind == _STRING:
            return self._strings(1, key)[0]
        return self._numbers(kind, 1, key)[0]

    def _array(self, key: str) -> list[Any]:
        kind = self.number("I", f"the type of {key}")
        if kind == _ARRAY:
            raise CheckpointError(f"{self.path}: {key} is an array of arrays; download it again")
        least = 8 if kind == _STRING else struct.calcsize(self._letter(kind, key))
        count = self.count(f"elements of {key}", least, MAX_ELEMENTS - self._elements)
        self._elements += count
        return self._strings(count, key) if kind == _STRING else self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> list[Any]:
        layout = f"<{count}{self._letter(kind, key)}"
        return list(struct.unpack(layout, self.take(struct.calcsize(layout), key)))

    def _letter(self, kind: int, key: str) -> str:
        if kind not in _FORMATS:
            raise CheckpointError(
                f"{self.path}: {key} has the unknown type {kind}; download it again"
            )
        return _FORMATS[kind]

    def _strings(self, count: int, key: str) -> list[str]:
        """Bytes that are not UTF-8 are replaced: they are no text that anybody types."""
        found = []
        for _ in range(count):
            length = int.from_bytes(self.take(8, key), "little")
            found.append(self.take(length, key).decode(errors="replace"))
        return found
