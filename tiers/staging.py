"""Reads from the drive into a GPU's memory, off the model's thread.

`DeviceReader` is the protocol; `StagedReader` is the way that works everywhere: direct I/O into
pinned memory, then a copy. The other one is `tierrun.io.gds.GdsReader`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch

from tierrun.io.direct import read_fully
from tierrun.io.reads import PART_BYTES
from tierrun.io.spare import Switch
from tierrun.tiers.memory import Memory, OrdinaryMemory, PinnedMemory
from tierrun.tiers.slab import host_bytes

# torch does not annotate it.
_Stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream


class DeviceReader(Protocol):
    """Reads byte ranges of the shards it was opened on into a GPU's memory.

    Guarantees: `read_device` fills the whole of `into` or raises OSError, calls may overlap; once
    it has returned, whatever is launched next on any stream sees the bytes; once it has returned or
    raised, nothing writes to `into` any more.
    Assumes: `into` is uint8, contiguous; it and `offset` are multiples of `PAGE`; until it has
    returned nothing on the GPU uses `into`, and no graph is being recorded.
    """

    name: str

    def read_device(self, shard: int, offset: int, into: torch.Tensor) -> None:
        """Fill `into` from `offset` of shard number `shard`; blocks."""


class BounceBuffer:
    """Pinned memory for a part of a record, and a stream to copy it with."""

    def __init__(self, memory: Memory, device: torch.device) -> None:
        self.data = memory.allocate(PART_BYTES)
        self._stream = _Stream(device) if device.type == "cuda" else None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Between device and host, one of which is `data`; returns once it is done."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()


class BounceBuffers:
    """`count` buffers, made at once: pinning memory makes the whole device wait."""

    def __init__(self, device: torch.device, count: int) -> None:
        cuda = device.type == "cuda"
        self._memory = PinnedMemory(device, strict=False) if cuda else OrdinaryMemory()
        self._buffers = [BounceBuffer(self._memory, device) for _ in range(count)]
        self._idle: SimpleQueue[BounceBuffer] = SimpleQueue()
        for buffer in self._buffers:
            self._idle.put(buffer)

    @contextmanager
    def borrow(self) -> Iterator[BounceBuffer]:
        """One that nobody else has; waits where all are in use."""
        buffer = self._idle.get()
        try:
            yield buffer
        finally:
            self._idle.put(buffer)

    def release(self) -> None:
        """Unlock their memory; none may be in use."""
        for buffer in self._buffers:
            self._memory.release(buffer.data)


class StagedReader:
    """From the drive into pinned memory, from there to the device, by parts.

    `flags` are those to open files with: O_DIRECT where there is direct I/O.
    """

    name = "pinned memory and a copy"

    def __init__(self, paths: Sequence[Path], buffers: BounceBuffers, flags: int) -> None:
        self._fds = [os.open(path, os.O_RDONLY | flags | os.O_CLOEXEC) for path in paths]
        self._buffers = buffers

    def read_device(self, shard: int, offset: int, into: torch.Tensor) -> None:
        """See `DeviceReader`."""
        with self._buffers.borrow() as buffer:
            for start in range(0, into.nbytes, PART_BYTES):
                target = into[start : start + PART_BYTES]
                part = buffer.data[: target.nbytes]
                read_fully(self._fds[shard], offset + start, host_bytes(part))
                buffer.copy(target, part)

    def close(self) -> None:
        """No read may be under way."""
        for fd in self._fds:
            os.close(fd)


class SparedDeviceReader:
    """Reads with `first`, and again with `spare` what it fails at; as `SparedReader` does."""

    def __init__(self, first: DeviceReader, spare: DeviceReader) -> None:
        self._first, self._spare = first, spare
        self._switch = Switch(first, spare)
        self.name = first.name

    def read_device(self, shard: int, offset: int, into: torch.Tensor) -> None:
        """See `DeviceReader`."""
        if self._switch.thrown:
            self._spare.read_device(shard, offset, into)
            return
        try:
            self._first.read_device(shard, offset, into)
        except OSError as error:
            self._spare.read_device(shard, offset, into)
            self._switch.throw(error)
            self.name = f"{self._first.name}, then {self._spare.name}"
