"""Byte ranges, alignment, and sizes as people write them."""

import re
from fractions import Fraction
from typing import NamedTuple

from tierrun.io.errors import UsageError

PAGE = 4096
"""Alignment of records on disk and of slots in memory: what O_DIRECT and GDS ask for."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)


class Extent(NamedTuple):
    """`nbytes` bytes from `offset` on."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def align_up(n: int, alignment: int = PAGE) -> int:
    """The smallest multiple of `alignment` that is at least `n`."""
    return -(-n // alignment) * alignment


def parse_bytes(text: str) -> int:
    """`8GiB`, `500MB`, `4096` → bytes (decimal and binary units told apart).

    Raises:
        UsageError: for anything else.
    """
    match = _SIZE.match(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size; write 8GiB, 500MB or a number of bytes")
    unit = (match[2] or "").lower()
    return int(Fraction(match[1]) * (_UNITS | _BINARY)[unit])


def format_bytes(n: float) -> str:
    """Bytes in the binary unit that keeps the number short: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
