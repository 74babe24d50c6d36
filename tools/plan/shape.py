"""What of a model decides its speed: sizes and counts, no names."""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from tierrun.io.header import DTYPE_BYTES
from tierrun.io.store import DENSE_BYTES, Manifest


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one layer: how many, how many of them a token uses, bytes and weights each."""

    count: int
    top_k: int
    nbytes: int
    weights: int


@dataclass(frozen=True, slots=True)
class Shape:
    """`resident_read` are the resident bytes that one token reads (embeddings are looked up),
    `resident_weights` their numbers; `kv_token` bytes of key-value cache a position, `kv_fixed`
    whatever the context. `packed` and `resident_packed`: the experts, and most of what else a token
    reads, are in a codec, not in plain numbers."""

    layers: tuple[Experts, ...]
    resident_bytes: int
    resident_read: int
    resident_weights: int
    kv_token: float
    kv_fixed: float
    packed: bool
    resident_packed: bool

    @property
    def expert_bytes(self) -> int:
        return sum(layer.count * layer.nbytes for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of experts that one token uses."""
        return sum(layer.top_k * layer.nbytes for layer in self.layers)

    def kv_bytes(self, context: int) -> float:
        """Bytes of key-value cache of `context` positions."""
        return self.kv_fixed + context * self.kv_token


def shape_of(
    manifest: Manifest, looked_up: Collection[str], kv_token: float, kv_fixed: float
) -> Shape:
    """The shape of `manifest`'s model; the residents `looked_up` are tables, not matrices."""
    layers = []
    for number, layer in enumerate(manifest.layers):
        record = manifest.class_of(number)
        weights = sum(prod(m.shape) for m in record.matrices if len(m.shape) == 2)
        layers.append(Experts(len(layer.records), layer.top_k, record.nbytes, weights))
    read = [resident for resident in manifest.residents if resident.name not in looked_up]
    codecs = {m.codec for c in manifest.classes for m in c.matrices if len(m.shape) == 2}
    return Shape(
        tuple(layers),
        manifest.resident_bytes,
        sum(resident.extent.nbytes for resident in read),
        sum(prod(resident.shape) for resident in read if len(resident.shape) == 2),
        kv_token,
        kv_fixed,
        not codecs <= DENSE_BYTES.keys(),
        2 * sum(r.extent.nbytes for r in read if r.dtype not in DTYPE_BYTES)
        > sum(r.extent.nbytes for r in read),
    )
