"""The layers of the key-value cache on the device: of full attention, and of windows.

See `tierrun.engine.gpu.cache`, which moves their position between two passes.
"""

from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from tierrun.engine.gpu.ops import append


class FullLayer(StaticLayer):  # type: ignore[no-untyped-call]
    """Keys and values of `room` positions, [1, heads, room, dim] in `dtype`."""

    def __init__(self, room: int, dtype: torch.dtype, position: torch.Tensor) -> None:
        super().__init__(max_cache_len=room)
        self.cumulative_length = position  # of the whole cache, which moves it between passes
        self.kept_dtype, self.fixed, self.length = dtype, False, 0
        self.visible = room
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

    def resize(self, room: int) -> None:
        """Move to buffers for `room` positions, with all that is held; between passes only.

        Raises:
            torch.OutOfMemoryError: nothing that is held is lost; it can be tried again.
        """
        assert self.length <= room, "more is held than there would be room for"
        if self.keys is not None and self.values is not None:
            self.keys = _resized(self.keys, self.length, room)
            self.values = _resized(self.values, self.length, room)
        self.max_cache_len = room

    @property
    def position_bytes(self) -> int:
        """Bytes that room for one position more takes; 0 before the first forward pass."""
        buffers = [buffer for buffer in (self.keys, self.values) if buffer is not None]
        return sum(buffer.nbytes // buffer.shape[2] for buffer in buffers)

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

    def resize(self, room: int) -> None:
        """A window is as long in any context."""

    @property
    def position_bytes(self) -> int:
        return 0


def _resized(buffer: torch.Tensor, held: int, room: int) -> torch.Tensor:
    """`buffer` [1, heads, L, dim] with room for another L; its first `held` positions stay."""
    if buffer.shape[2] == room:
        return buffer
    heads, size = buffer.shape[1], buffer.shape[3]
    larger = buffer.new_zeros(1, heads, room, size)
    larger[:, :, :held] = buffer[:, :, :held]
    return larger
