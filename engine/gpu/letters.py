"""Where the device tells the host which experts a layer wants: polled, not waited for."""

import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.engine.kernels.lookup import MAILBOX_HEAD, mailbox_elements
from tierrun.io.errors import DeviceError

_PATIENCE_SECONDS = 60.0
_POLLS_BETWEEN_CLOCKS = 2000


class Letter(NamedTuple):
    """What one layer wants: `experts` and what the slot table says of each, [A] each.

    Of those that the CPU is to compute, though the device could, the entry says so.
    """

    experts: NDArray[np.int64]
    entries: NDArray[np.int64]


class Mailboxes:
    """One mailbox per experts layer, each for at most `assignments` of them.

    Assumes: a layer's mailbox is emptied (`wait`) before the device writes into it again.
    """

    def __init__(self, num_layers: int, assignments: int, pinned: bool) -> None:
        shape = (num_layers, mailbox_elements(assignments))
        self._memory = torch.zeros(shape, dtype=torch.int64, pin_memory=pinned)
        self._values = self._memory.numpy()

    def memory(self, layer: int) -> torch.Tensor:
        """The mailbox of `layer`, for the device to write."""
        return self._memory[layer]

    def wait(self, layer: int, assignments: int) -> Letter:
        """The letter of `layer`; polls until it is there, and empties the mailbox.

        Everything that was enqueued before the letter has been done by the device.

        Raises:
            DeviceError: none came within a minute, or the device is lost.
        """
        values = self._values[layer]
        if not values[0]:
            _poll(values)
        values[0] = 0
        body = values[MAILBOX_HEAD : MAILBOX_HEAD + 2 * assignments].copy()
        return Letter(body[:assignments], body[assignments:])

    def clear(self) -> None:
        """Empty all, after a forward pass that was broken off; nothing may be under way."""
        self._values[:, 0] = 0


def _poll(values: NDArray[np.int64]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        for _ in range(_POLLS_BETWEEN_CLOCKS):
            if values[0]:
                return
        if torch.cuda.is_available():
            _check_device()
        if time.monotonic() > deadline:
            raise DeviceError("the GPU has not answered for a minute; is it hung or lost?")


def _check_device() -> None:
    try:
        torch.cuda.current_stream().query()
    except RuntimeError as error:
        raise DeviceError(f"the GPU failed: {str(error).splitlines()[0]}") from error
