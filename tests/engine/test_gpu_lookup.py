"""The device looks up, and tells the host."""

import numpy as np
import pytest
import torch

from tierrun.engine.gpu.letters import Mailboxes
from tierrun.engine.kernels.lookup import look_up

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.mark.parametrize("count", [1, 8, 13, 64])
def test_slots_come_back_and_the_letter_arrives(count: int) -> None:
    boxes = Mailboxes(num_layers=3, assignments=64, pinned=CUDA)
    table = torch.arange(100, 200, dtype=torch.int64, device=DEVICE) * 4096
    table[::3] = -1
    for _ in range(3):  # a mailbox is used again and again
        experts = torch.randint(0, 100, (count,), device=DEVICE)
        slots = torch.empty(count, dtype=torch.int64, device=DEVICE)
        look_up(table, experts, slots, boxes.memory(1))
        letter = boxes.wait(1, count)
        assert np.array_equal(letter.experts, experts.cpu().numpy())
        assert np.array_equal(letter.slots, table[experts].cpu().numpy())
        assert torch.equal(slots, table[experts])
        assert not boxes.memory(1)[0]


def test_a_forward_pass_broken_off_leaves_no_letter() -> None:
    boxes = Mailboxes(num_layers=2, assignments=4, pinned=CUDA)
    boxes.memory(0)[0] = 1
    boxes.clear()
    assert not boxes.memory(0)[0]
