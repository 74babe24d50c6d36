"""Where the device tells the host which experts a layer wants: polled, and noted down."""

import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.engine.kernels.answer import Journal, LaneArrays, answer, no_lane
from tierrun.engine.kernels.lookup import MAILBOX_HEAD, mailbox_elements
from tierrun.io.errors import DeviceError

_PATIENCE_SECONDS = 60.0


class Letter(NamedTuple):
    """What one layer wants: `experts` and what the slot table says of each, [A] each.

    Of those that the CPU is to compute, though the device could, the entry says so.
    """

    experts: NDArray[np.int64]
    entries: NDArray[np.int64]


class Mailboxes:
    """One mailbox per experts layer, each for at most `assignments` of them; and a journal.

    Assumes: a layer's letter is read (`answer`) before the device writes the next.
    """

    def __init__(self, num_layers: int, assignments: int, pinned: bool) -> None:
        shape = (num_layers, mailbox_elements(assignments))
        self._memory = torch.zeros(shape, dtype=torch.int64, pin_memory=pinned)
        self._values = self._memory.numpy()
        self._boxes = [self._memory[layer].data_ptr() for layer in range(num_layers)]
        words = 2 * num_layers * assignments
        self._journal = Journal(
            np.zeros(words, np.int64), np.zeros(words, np.int64), np.zeros(1, np.int64)
        )
        self._no_lane = no_lane()

    def memory(self, layer: int) -> torch.Tensor:
        """The mailbox of `layer`, for the device to write."""
        return self._memory[layer]

    def answer(
        self,
        layer: int,
        assignments: int,
        top_k: int,
        first: int,
        addresses: NDArray[np.int64],
        lane: LaneArrays | None = None,
    ) -> int:
        """Wait for the letter of `layer`, and do what can be done; see `kernels.answer`.

        Everything that was enqueued before the letter has been done by the device.

        Raises:
            DeviceError: none came within a minute, or the device is lost.
        """
        box, lane = self._boxes[layer], lane or self._no_lane
        deadline = 0.0
        while True:
            found = int(
                answer(box, layer, assignments, top_k, first, addresses, *self._journal, *lane)
            )
            if found >= 0:
                return found
            now = time.monotonic()
            deadline = deadline or now + _PATIENCE_SECONDS
            _check_device(late=now > deadline)

    def letter(self, layer: int, assignments: int) -> Letter:
        """The letter that has just been answered."""
        body = self._values[layer, MAILBOX_HEAD : MAILBOX_HEAD + 2 * assignments].copy()
        return Letter(body[:assignments], body[assignments:])

    def noted(self) -> Letter:
        """All letters in the journal, which is empty then; experts are numbered over all layers."""
        count = int(self._journal.filled[0])
        self._journal.filled[0] = 0
        return Letter(self._journal.experts[:count].copy(), self._journal.entries[:count].copy())

    def clear(self) -> None:
        """Empty all, after a forward pass that was broken off; nothing may be under way."""
        self._values[:, 0] = 0
        self._journal.filled[0] = 0


def _check_device(*, late: bool) -> None:
    if torch.cuda.is_available():
        try:
            torch.cuda.current_stream().query()
        except RuntimeError as error:
            raise DeviceError(f"the GPU failed: {str(error).splitlines()[0]}") from error
    if late:
        raise DeviceError("the GPU has not answered for a minute; is it hung or lost?")
