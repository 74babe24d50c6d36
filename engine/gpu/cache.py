"""The key-value cache on the device: allocated once, addressed by positions that lie there too.

transformers' StaticCache does as much for layers of full attention; its sliding layers branch on a
Python integer, which a CUDA graph would freeze. Here a window is a buffer somewhat longer than the
window, whose first slot stands for the position `base`, a tensor; when it is full its last window
is moved to the front, between two tokens. Layers of other kinds (recurrent states, convolutions,
indexers) are transformers' own.

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
    StaticLayer,
    get_layer_types_and_kwargs,
)

from tierrun.engine.gpu.ops import append
from tierrun.io.errors import ModelError

log = logging.getLogger(__name__)

_WINDOWS = ("sliding_attention", "chunked_attention")

_CPU = torch.device("cpu")
_LEAST_BUCKET = 512

_TAKEN_OVER = {
    kind: STATIC_LAYER_TYPE_MAPPING[kind]
    for kind in ("indexed_attention", "conv", "linear_attention", "dummy")
}
"""Layers of transformers' own whose decode is the same work for every token."""


class FullLayer(StaticLayer):  # type: ignore[no-untyped-call]
    """Keys and values of all `capacity` positions, [1, heads, capacity, dim] in `dtype`."""

    def __init__(self, capacity: int, dtype: torch.dtype, position: torch.Tensor) -> None:
        super().__init__(max_cache_len=capacity)
        self.cumulative_length = position  # of the whole cache, which moves it between passes
        self.kept_dtype, self.fixed, self.length = dtype, False, 0
        self.visible = capacity
        self.base_length = 0
        self.base = torch.zeros_like(position)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(
            key_states.to(self.kept_dtype), value_states.to(self.kept_dtype)
        )
        torch._dynamo.mark_static_address(self.base)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; all that may be attended to, with what is masked beyond it in fixed mode."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.fixed:
            place = self.cumulative_length, self.base
            append(key_states, value_states, self.keys, self.values, *place)
            return self.keys[:, :, : self.visible], self.values[:, :, : self.visible]
        first = self.length - self.base_length
        end = first + key_states.shape[-2]
        self.keys[:, :, first:end] = key_states
        self.values[:, :, first:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        if self.fixed:
            return self.visible, self.base
        return self.length - self.base_length + query_length, self.base_length

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.fixed and self.is_initialized else self.length

    def make_room(self, count: int) -> None:
        """Before a forward pass of `count` tokens; called between tokens only."""

    def reset(self) -> None:
        self.length = self.base_length = 0
        self.base.zero_()


class WindowLayer(FullLayer):  # type: ignore[no-untyped-call]
    """The last `window` positions, in a buffer with room for `spare` more."""

    is_sliding = True

    def __init__(self, window: int, spare: int, dtype: torch.dtype, position: torch.Tensor) -> None:
        super().__init__(window - 1 + spare, dtype, position)
        self.window = window

    def make_room(self, count: int) -> None:
        """Move the last window to the front where `count` more tokens would not fit behind it."""
        held = self.length - self.base_length
        if not self.is_initialized or held + count <= self.max_cache_len:
            return
        kept = min(held, self.window - 1)
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[:, :, :kept] = buffer[:, :, held - kept : held].clone()
        self.base_length = self.length - kept
        self.base.fill_(self.base_length)


class FixedCache(Cache):
    """The cache of one context of at most `capacity` tokens, `chunk` at once.

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
    ) -> None:
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        make = partial(_layer, capacity=capacity, chunk=chunk, dtype=dtype, position=self._position)
        kinds, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        pairs = zip(kinds, arguments, strict=True)
        super().__init__([make(kind, given) for kind, given in pairs])
        self.length, self.bucket, self._capacity = 0, capacity, capacity
        self.has_buckets = not any(isinstance(layer, StaticIndexedLayer) for layer in self.layers)

    @property
    def held(self) -> "FixedCache":
        """What the model is given."""
        return self

    def keep(self, cache: Cache) -> None:
        """What the model returned: this very object."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; 0 before the first forward pass."""
        filled = [layer for layer in self.layers if isinstance(layer, FullLayer)]
        tensors = [t for layer in filled for t in (layer.keys, layer.values) if t is not None]
        return sum(tensor.nbytes for tensor in tensors)

    @torch.inference_mode()
    def begin(self, count: int, *, fixed: bool) -> None:
        """A forward pass of `count` tokens follows."""
        self.bucket = self._bucket(self.length + count)
        for layer in self.layers:
            if isinstance(layer, FullLayer):
                layer.make_room(count)
                layer.fixed = fixed
                if not isinstance(layer, WindowLayer):
                    layer.visible = min(self.bucket, layer.max_cache_len)

    def _bucket(self, length: int) -> int:
        """How much of the buffers a fixed pass sees: shapes change each time it doubles."""
        if not self.has_buckets:
            return self._capacity
        return min(self._capacity, max(_LEAST_BUCKET, 1 << (length - 1).bit_length()))

    def end(self, count: int) -> None:
        """It is over: `count` tokens more are held."""
        self._set_length(self.length + count)

    def _set_length(self, length: int) -> None:
        self.length = length
        self._position.fill_(length)
        for layer in self.layers:
            if isinstance(layer, FullLayer):
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
    nbytes = bucket = 0

    def __init__(self) -> None:
        self.held: Cache | None = None
        self.length = 0

    def keep(self, cache: Cache) -> None:
        """What the model returned."""
        self.held = cache

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
) -> FixedCache | GrowingCache:
    """A fixed cache, or the model's own where there is no fixed one for it; says so."""
    try:
        return FixedCache(config, capacity, chunk, dtype, device)
    except ModelError as error:
        log.warning("the key-value cache grows by copying, and decode has no graphs: %s", error)
        return GrowingCache()


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
