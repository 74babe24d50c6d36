"""How many tokens of a prompt go through a model on a device at once: numbers in, a choice out.

A chunk moves every expert that VRAM lacks once, however many its tokens: it should be so large that
computing it takes as long as that. A larger one gains nothing; and what it computes in is memory
that experts do not have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from tierrun.io.extent import format_bytes
from tierrun.io.store import Manifest, RecordClass

EFFICIENT = 2048
"""Tokens that fill the kernels' tiles: with fewer, prompts are slower even if nothing moves."""

_LEAST, _MOST = 512, 8192
"""Sizes chosen from. What experts lose to the least is not asked about."""

_SHARE = 1 / 8
"""Of what is free for experts, the most that a larger one may take."""


class Chunk(NamedTuple):
    """Tokens at once, and why so many."""

    tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second: bytes from RAM to the device, bytes from the drive, and tokens computed."""

    upload: float
    drive: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: `free` on the device for experts and chunks, and of `experts` in all.

    Of `free` the experts are to have `asked` (None: all that chunks leave), and not less than
    `least`. What VRAM lacks is in RAM as far as `ram` goes, else on the drive.
    """

    free: int
    asked: int | None
    least: int
    experts: int
    ram: int

    @property
    def wanted(self) -> int:
        """What chunks must leave to the experts."""
        return self.least if self.asked is None else self.asked

    def fits(self, taken: int) -> bool:
        """Whether the experts have what they must when a chunk takes `taken` bytes."""
        return self.free - taken >= self.wanted

    def affords(self, tokens: int, taken: int) -> bool:
        """Whether a chunk of `tokens` is worth `taken` bytes."""
        return self.fits(taken) and (tokens <= _LEAST or taken <= _SHARE * self.free)

    def missing(self, taken: int) -> int:
        """Of the experts' bytes, those not in VRAM beside a chunk."""
        left = max(0, self.free - taken)
        return max(0, self.experts - (left if self.asked is None else min(left, self.asked)))

    def moving(self, taken: int, rates: Rates) -> float:
        """Seconds in which what is missing comes, from RAM and the drive at the same time."""
        missing = self.missing(taken)
        return max(missing / rates.upload, max(0, missing - self.ram) / rates.drive)


def sizes_for(context: int) -> tuple[int, ...]:
    """Chunks to choose from, ascending: powers of two, or the whole of a tiny context."""
    powers = (1 << bit for bit in range(_LEAST.bit_length() - 1, _MOST.bit_length()))
    return tuple(size for size in powers if size <= context) or (context,)


def choose_chunk(taken: Mapping[int, int], rates: Rates, room: Room) -> Chunk:
    """The smallest of some sizes at which computing takes as long as moving; not less than fills
    the kernels' tiles, and not more than the memory is worth.

    Args:
        taken: the sizes, ascending, each with the bytes that it takes of the device.
    """
    sizes = list(taken)
    most = max((s for s in sizes if room.affords(s, taken[s])), default=sizes[0])
    for tokens in (size for size in sizes if min(EFFICIENT, most) <= size <= most):
        if tokens / rates.tokens >= room.moving(taken[tokens], rates):
            break
    return Chunk(tokens, _reason(tokens, sizes, taken, rates, room))


def _reason(
    tokens: int, sizes: Sequence[int], taken: Mapping[int, int], rates: Rates, room: Room
) -> str:
    seconds, moving = tokens / rates.tokens, room.moving(taken[tokens], rates)
    larger = next((size for size in sizes if size > tokens), None)
    balance = f"all {format_bytes(room.experts)} of experts are in VRAM"
    if room.missing(taken[tokens]):
        balance = f"computing takes {_milliseconds(seconds)}, {_moved(taken[tokens], rates, room)}"
    if tokens >= EFFICIENT and seconds >= moving:
        return balance
    if larger is None:
        return f"{balance}; larger ones are not made"
    return f"{balance}; {larger} would take {format_bytes(taken[larger])} of VRAM, too much"


def _moved(taken: int, rates: Rates, room: Room) -> str:
    missing, upload = room.missing(taken), f"{rates.upload / 1e9:.1f} GB/s"
    cold = max(0, missing - room.ram)
    drive = f", {format_bytes(cold)} of it from the drive at {rates.drive / 1e9:.1f} GB/s"
    return (
        f"moving {format_bytes(missing)} of experts {_milliseconds(room.moving(taken, rates))} "
        f"({upload}{drive if cold else ''})"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def flops_per_token(manifest: Manifest, vocabulary: int) -> int:
    """What the products of a prompt's token take: its experts' and the resident matrices', but for
    those over the vocabulary: looked up, or computed for the last token alone. Attention over the
    context is left out."""
    experts = sum(
        layer.top_k * _num_weights(manifest.class_of(number))
        for number, layer in enumerate(manifest.layers)
    )
    residents = sum(
        prod(resident.shape)
        for resident in manifest.residents
        if len(resident.shape) == 2 and vocabulary not in resident.shape
    )
    return 2 * (experts + residents)


def _num_weights(record: RecordClass) -> int:
    return sum(prod(matrix.shape) for matrix in record.matrices if len(matrix.shape) == 2)
