"""The key-value cache on the device: fixed addresses, and positions that lie there too.

transformers' StaticCache does as much for layers of full attention; its sliding layers branch on a
Python integer, which a CUDA graph would freeze. Here a window is a buffer somewhat longer than the
window, whose first slot stands for the position `base`, a tensor; when it is full its last window
is moved to the front, between two tokens. Layers of other kinds (recurrent states, convolutions,
indexers) are transformers' own.

Layers of full attention have *room* for a power of two of positions (or for all), which changes
between two forward passes only, and then every address does: see `tierrun.engine.gpu.room`.

Two modes, chosen by the caller before each forward pass: *fixed* (decode: device-side positions,
and shapes that stay the same until the context outgrows the next power of two, as a graph wants)
and *free* (prefill: host integers, only what is filled).
"""

import logging
from functools import partial
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    StaticIndexedLayer,
    get_layer_types_and_kwargs,
)

from tierrun.engine.gpu.cachelayers import FullLayer, WindowLayer
from tierrun.io.errors import ModelError

log = logging.getLogger(__name__)

_WINDOWS = ("sliding_attention", "chunked_attention")

_CPU = torch.device("cpu")
_LEAST_BUCKET = 512

LEAST_ROOM = 2048
"""Positions that layers of full attention have room for at the beginning. Not less than the least
bucket: so what a pass sees, and with it every bit, does not depend on the room."""

_TAKEN_OVER = {
    kind: STATIC_LAYER_TYPE_MAPPING[kind]
    for kind in ("indexed_attention", "conv", "linear_attention", "dummy")
}
"""Layers of transformers' own whose decode is the same work for every token."""


class FixedCache(Cache):
    """The cache of one context of at most `capacity` tokens, `chunk` at once.

    It begins with room for `least_room` of them and two chunks. Indexed layers, which transformers
    allocates, have room for all, and then the others too.

    Raises:
        ModelError: an architecture with layers of which transformers has no fixed-size cache.
    """

    fits_graphs = True

    def __init__(
        self,
        config: PreTrainedConfig,
        capacity: int,
        chunk: int,
        dtype: torch.dtype,
        device: torch.device,
        least_room: int = LEAST_ROOM,
    ) -> None:
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        make = partial(_layer, capacity=capacity, chunk=chunk, dtype=dtype, position=self._position)
        kinds, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        pairs = zip(kinds, arguments, strict=True)
        super().__init__([make(kind, given) for kind, given in pairs])
        self.length, self.bucket, self.capacity = 0, capacity, capacity
        self.has_buckets = not any(isinstance(layer, StaticIndexedLayer) for layer in self.layers)
        self._ours = [layer for layer in self.layers if isinstance(layer, FullLayer)]
        grows = self.has_buckets and any(type(layer) is FullLayer for layer in self._ours)
        self._least_room = max(least_room, 2 * chunk) if grows else capacity
        self.room = capacity
        self.resize(self.room_for(0))

    @property
    def held(self) -> "FixedCache":
        """What the model is given."""
        return self

    def keep(self, cache: Cache) -> None:
        """What the model returned: this very object."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; 0 before the first forward pass."""
        tensors = [t for layer in self._ours for t in (layer.keys, layer.values) if t is not None]
        return sum(tensor.nbytes for tensor in tensors)

    # -- room -----------------------------------------------------------------------------------

    def room_for(self, length: int) -> int:
        """The room with which a context of `length` tokens fits: a power of two, or all."""
        return min(self.capacity, _power_of_two(max(self._least_room, length)))

    def nbytes_more(self, room: int) -> int:
        """Bytes more than now with this room; negative where it is less."""
        return (room - self.room) * sum(layer.position_bytes for layer in self._ours)

    @torch.no_grad()
    def resize(self, room: int) -> None:
        """Change the room, layer by layer; what is held stays. No recorded pass may be used again.

        Raises:
            torch.OutOfMemoryError: it can be tried again, and until then the room is as it was.
        """
        for layer in self._ours:
            layer.resize(room)
        self.room = room

    # -- passes ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def begin(self, count: int, *, fixed: bool) -> None:
        """A forward pass of `count` tokens follows; there is room for them."""
        assert self.length + count <= self.room, "no room was made"
        self.bucket = self._bucket(self.length + count)
        for layer in self._ours:
            layer.make_room(count)
            layer.fixed = fixed
            if not isinstance(layer, WindowLayer):
                layer.visible = min(self.bucket, self.room)

    def _bucket(self, length: int) -> int:
        """How much of the buffers a fixed pass sees: shapes change each time it doubles."""
        if not self.has_buckets:
            return self.capacity
        return min(self.capacity, _power_of_two(max(_LEAST_BUCKET, length)))

    def end(self, count: int) -> None:
        """It is over: `count` tokens more are held."""
        self._set_length(self.length + count)

    def _set_length(self, length: int) -> None:
        self.length = length
        self._position.fill_(length)
        for layer in self._ours:
            layer.length = length

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget the context; the memory stays."""
        for layer in self.layers:
            layer.reset()
        self._set_length(0)


class GrowingCache:
    """A cache of the model's own making, for architectures that want it so; grows by copying."""

    fits_graphs = has_buckets = False
    nbytes = bucket = room = 0

    def __init__(self) -> None:
        self.held: Cache | None = None
        self.length = 0

    def keep(self, cache: Cache) -> None:
        """What the model returned."""
        self.held = cache

    def room_for(self, length: int) -> int:
        """No room of its own."""
        return 0

    def nbytes_more(self, room: int) -> int:
        """See `FixedCache`."""
        return 0

    def resize(self, room: int) -> None:
        """See `FixedCache`."""

    def begin(self, count: int, *, fixed: bool) -> None:
        """See `FixedCache`."""

    def end(self, count: int) -> None:
        """See `FixedCache`."""
        self.length += count

    def reset(self) -> None:
        """See `FixedCache`."""
        self.held, self.length = None, 0


def make_cache(
    config: PreTrainedConfig,
    capacity: int,
    chunk: int,
    dtype: torch.dtype,
    device: torch.device = _CPU,
    least_room: int = LEAST_ROOM,
) -> FixedCache | GrowingCache:
    """A fixed cache, or the model's own where there is no fixed one for it; says so."""
    try:
        return FixedCache(config, capacity, chunk, dtype, device, least_room)
    except ModelError as error:
        log.warning("the key-value cache grows by copying, and decode has no graphs: %s", error)
        return GrowingCache()


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _layer(
    kind: str,
    given: dict[str, Any],
    *,
    capacity: int,
    chunk: int,
    dtype: torch.dtype,
    position: torch.Tensor,
) -> Any:
    """The cache layer for one of transformers' layer types."""
    window = given.get("sliding_window")
    if kind in _WINDOWS and window is not None and window - 1 + chunk < capacity:
        return WindowLayer(window, chunk, dtype, position)
    if kind in ("full_attention", *_WINDOWS):
        return FullLayer(capacity, dtype, position)
    if kind not in _TAKEN_OVER:
        raise ModelError(f"layers of type {kind} have no cache of fixed size in transformers")
    return _TAKEN_OVER[kind](max_cache_len=capacity, **given)
