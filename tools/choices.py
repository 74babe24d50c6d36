"""In what form weights are stored: what was asked for, what the source has, and what came of it."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch

from tierrun.engine.codecs.codec import Codec
from tierrun.io.extent import format_bytes
from tierrun.tools.precision import Precision
from tierrun.tools.quantise import Tally, parse_quant
from tierrun.tools.sources.source import Source
from tierrun.tools.tracing import Grid, Tracer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quantising:
    """What `--quant`, `--quant-resident` and `--requant` ask for; None: nothing."""

    experts: Codec | None = None
    residents: Codec | None = None
    lossy: Codec | None = None

    @classmethod
    def parse(
        cls, quant: str | None, quant_resident: str | None, requant: str | None
    ) -> "Quantising":
        """From the names of codecs.

        Raises:
            UsageError: one that tierrun does not quantise to.
        """
        return cls(
            parse_quant("--quant", quant),
            parse_quant("--quant-resident", quant_resident),
            parse_quant("--requant", requant),
        )


@dataclass(slots=True)
class Notes:
    """What was not done as one might expect, by reason: how many weights, and bytes as stored."""

    found: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, reason: str, count: int, nbytes: int) -> None:
        old = self.found.get(reason, (0, 0))
        self.found[reason] = (old[0] + count, old[1] + nbytes)

    def tell(self) -> None:
        for reason, (count, nbytes) in self.found.items():
            log.warning("%d weights (%s) %s", count, format_bytes(nbytes), reason)


@dataclass(frozen=True, slots=True)
class Choices:
    """What is asked about every weight of `source`, and a record of what was chosen."""

    source: Source
    precision: Precision
    quantising: Quantising = Quantising()
    notes: Notes = field(default_factory=Notes)
    tracer: Tracer = field(default_factory=Tracer)
    experts: Tally = field(default_factory=lambda: Tally("experts"))
    residents: Tally = field(default_factory=lambda: Tally("resident weights"))

    def kind(self, name: str) -> Codec | None:
        """The codec that tensor `name` is packed in; None for plain numbers."""
        packing = self.source.packing(name)
        return None if packing is None else packing.codec

    def grid(self, name: str, *, sliced: bool) -> Grid:
        """Tensor `name` as rows and columns; `sliced`: one row of its first dimension."""
        shape, packing = self.source.shape(name), self.source.packing(name)
        axis = len(shape) - 1 if packing is None else packing.axis
        return Grid((1, *shape[1:]) if sliced else shape, axis)

    def is_lossy(self, names: Iterable[str]) -> bool:
        """Whether any of the tensors `names` can only be quantised anew."""
        return not self.source.lossy.isdisjoint(names)

    def dtype(self, target: str, names: Sequence[str]) -> torch.dtype:
        """What parameter `target` of the tensors `names` is stored as where it is not packed."""
        widest = reduce(torch.promote_types, map(self.source.dtype, names))
        return self.precision.stored(target, widest)

    def note_dense(self, kinds: Iterable[Codec | None], count: int, nbytes: int) -> None:
        """Packed weights are stored as numbers: what the model wants is not rows of them."""
        packed = " and ".join(sorted({kind.name for kind in kinds if kind is not None}))
        self.notes.add(
            f"cannot stay in {packed}: the model has them in another arrangement; their exact "
            "values are stored",
            count,
            nbytes,
        )

    def note_lossy(self, codec: Codec, count: int, nbytes: int) -> None:
        """Weights of a type without a codec are quantised anew to `codec`."""
        reason = f"are of types that have no codec: quantised anew to {codec.name}, which is lossy"
        self.notes.add(reason, count, nbytes)

    def errors(self) -> Iterator[str]:
        """The error that quantising left, for a log line."""
        yield from self.experts.parts()
        yield from self.residents.parts()
