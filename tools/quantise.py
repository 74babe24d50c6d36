"""Quantising to Q8_0, Q4_0 and MXFP4: per group of 32 the scale that leaves the least square error.

As llama.cpp's `make_qx_quants` does, several scales are tried: the codes that each gives have a
least-squares scale of their own, which is rounded to what is stored and judged with the codes
nearest to that. Plain rounding to the largest value is among the candidates, so that no group is
ever worse than with it.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from tierrun.engine.codecs.codec import Codec, find_codec
from tierrun.engine.codecs.expand import power_of_two
from tierrun.engine.codecs.planes import Fields
from tierrun.io.errors import CheckpointError, UsageError

log = logging.getLogger(__name__)

GROUP = 32
CHOICES = ("q8_0", "q4_0", "mxfp4")

_CHUNK = 1 << 18
"""Elements at a time: their temporaries stay in cache."""

_HALF_MAX = torch.finfo(torch.float16).max


def parse_quant(flag: str, name: str | None) -> Codec | None:
    """The codec that `flag` asks for; None stays None.

    Raises:
        UsageError: not one that tierrun quantises to.
    """
    if name is None:
        return None
    if name not in CHOICES:
        raise UsageError(f"{flag} {name}: choose {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")
    return find_codec(name)


@dataclass(slots=True)
class Tally:
    """The error that quantising left, summed over `what` (experts, or resident weights)."""

    what: str
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, codec: Codec, error: float, signal: float) -> None:
        """Sums of squares, of the error and of the values."""
        old = self.squares.get(codec.name, (0.0, 0.0))
        self.squares[codec.name] = (old[0] + error, old[1] + signal)

    def parts(self) -> Iterator[str]:
        """`experts 7.6 % (q4_0)`: root mean square of the error relative to the values'."""
        for name, (error, signal) in sorted(self.squares.items()):
            share = (error / signal) ** 0.5 if signal else 0.0
            yield f"{self.what} {100 * share:.2g} % ({name})"


def quantise(codec: Codec, values: torch.Tensor, what: str, tally: Tally | None = None) -> Fields:
    """The rows `values` (fp32 [rows, in]) in `codec`; the last group of a row may be shorter.

    Raises:
        CheckpointError: a value is NaN or infinite; `what` and the row are named.
    """
    rows, columns = values.shape
    if not values.isfinite().all():
        row = int((~values.isfinite()).any(dim=1).int().argmax())
        raise CheckpointError(f"{what}: row {row} has a value that is NaN or infinite")
    groups = torch.nn.functional.pad(values, (0, -columns % GROUP)).view(-1, GROUP)
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    scales = torch.empty(len(codes), dtype=torch.uint8 if codec.book else torch.float16)
    error = 0.0
    for start in range(0, len(groups), _CHUNK // GROUP):
        part = slice(start, start + _CHUNK // GROUP)
        codes[part], scales[part], left = _METHODS[codec.name](groups[part])
        error += left
    if tally is not None:
        tally.add(codec, error, float(values.square().sum(dtype=torch.float64)))
    return Fields(codes.view(rows, -1)[:, :columns], (scales.view(rows, -1),))


_Made = tuple[torch.Tensor, torch.Tensor, float]


def _integers(groups: torch.Tensor, low: int, high: int, limits: tuple[float, ...]) -> _Made:
    """Codes `low` to `high` (stored from 0 up) and half scales.

    Each of `limits` is a number that the value of largest magnitude becomes, before rounding; the
    first is that of plain rounding.
    """
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    best_scale = _half(largest / limits[0])
    best = _error(groups, best_scale, _codes(groups, best_scale, low, high))
    for limit in limits:
        codes = _codes(groups, largest / limit, low, high)
        scale = _half(_dot(groups, codes) / _dot(codes, codes).clamp_(min=1))
        error = _error(groups, scale, _codes(groups, scale, low, high))
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
    stored = (_codes(groups, best_scale, low, high) - low).to(torch.uint8)
    return stored, best_scale.to(torch.float16).flatten(), float(best.sum(dtype=torch.float64))


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16).to(torch.float32)


def _codes(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (groups * inverse).round_().clamp_(low, high)


def _error(groups: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The square error of each group, in the memory of `codes`."""
    left = torch.addcmul(groups, codes, scale, value=-1, out=codes)
    return _dot(left, left)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    products: torch.Tensor = torch.linalg.vecdot(a, b)
    return products.unsqueeze_(1)


def _microscaled(groups: torch.Tensor) -> _Made:
    """FP4 numbers under powers of two."""
    magnitude = groups.abs()
    exponent = magnitude.amax(dim=1, keepdim=True).frexp().exponent - 3  # 6 is below 2^3
    best = torch.full((len(groups), 1), torch.inf)
    best_byte = torch.zeros_like(exponent)
    for shift in (0, 1, -1):  # the first is what plain rounding takes
        byte = (exponent + shift + 127).clamp_(0, 254)
        scale = power_of_two(byte)
        error = _error(magnitude, scale, _nearest_fp4(magnitude / scale))
        better = error < best
        best = torch.where(better, error, best)
        best_byte = torch.where(better, byte, best_byte)
    numbers = find_codec("mxfp4").numbers()[:8]
    codes = torch.bucketize(_nearest_fp4(magnitude / power_of_two(best_byte)), numbers)
    codes += 8 * groups.signbit()
    stored = best_byte.to(torch.uint8).flatten()
    return codes.to(torch.uint8), stored, float(best.sum(dtype=torch.float64))


def _nearest_fp4(magnitude: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (magnitude / step).round_().mul_(step).clamp_(max=6)


_METHODS: dict[str, Callable[[torch.Tensor], _Made]] = {
    "q8_0": lambda groups: _integers(groups, -128, 127, (127, -128, 126.5, 126, -127.5)),
    "q4_0": lambda groups: _integers(
        groups, -8, 7, (-8, -7.2, -7.4, -7.6, -7.8, -8.2, -8.4, -8.6, -8.8)
    ),
    "mxfp4": _microscaled,
}
