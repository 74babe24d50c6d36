"""A key-value cache layer with room to grow: a token is written behind the others, nothing moved.

transformers' own copies all keys and values for every token.
"""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_LEAST = 256
"""Positions of the first buffers; they double."""


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [1, heads, length, size] in buffers with room for more positions."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.length = keys.shape[2]
        self._buffers = keys, values
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    @property
    def keys(self) -> Any:
        return self._buffers[0][:, :, : self.length]

    @keys.setter
    def keys(self, value: Any) -> None:
        """The base class's constructor sets nothing."""
        assert value is None

    @property
    def values(self) -> Any:
        return self._buffers[1][:, :, : self.length]

    @values.setter
    def values(self, value: Any) -> None:
        assert value is None

    def get_seq_length(self) -> int:
        return self.length

    def reserve(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, with room for `count` positions more; what is written there is no one's
        until `advance`."""
        if self.length + count > self._buffers[0].shape[2]:
            room = max(_LEAST, 2 * (self.length + count))
            keys, values = (_larger(buffer, self.length, room) for buffer in self._buffers)
            self._buffers = keys, values
        return self._buffers

    def advance(self, count: int) -> None:
        """`count` positions more are in the buffers."""
        self.length += count

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; all there is."""
        count = key_states.shape[2]
        for buffer, states in zip(self.reserve(count), (key_states, value_states), strict=True):
            buffer[:, :, self.length : self.length + count] = states
        self.advance(count)
        return self.keys, self.values


def _larger(buffer: torch.Tensor, held: int, room: int) -> torch.Tensor:
    larger = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])
    larger[:, :, :held] = buffer[:, :, :held]
    return larger


def let_grow(cache: Cache) -> None:
    """Exchange the layers of `cache` that keep everything for such that grow."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            assert layer.keys is not None and layer.values is not None
            cache.layers[number] = GrowingLayer(layer.keys, layer.values)
