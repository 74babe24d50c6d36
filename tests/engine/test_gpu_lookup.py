"""The device looks up, and tells the host."""

import numpy as np
import pytest
import torch

from tierrun.engine.gpu.letters import Mailboxes
from tierrun.engine.kernels.join import join
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


@pytest.mark.parametrize(("tokens", "size"), [(1, 96), (3, 1000), (8, 2048)])
def test_the_input_arrives_with_the_letter(tokens: int, size: int) -> None:
    boxes = Mailboxes(num_layers=1, assignments=16, pinned=CUDA)
    table = torch.arange(32, dtype=torch.int64, device=DEVICE)
    copy = torch.zeros(8 * size, pin_memory=CUDA)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, size, generator=generator).to(DEVICE)
        experts = torch.randint(0, 32, (tokens, 2), device=DEVICE)
        slots = torch.empty(2 * tokens, dtype=torch.int64, device=DEVICE)
        look_up(table, experts, slots, boxes.memory(0), hidden, copy)
        boxes.wait(0, 2 * tokens)
        assert torch.equal(copy[: hidden.numel()].view(tokens, size), hidden.cpu())
        assert not copy[hidden.numel() :].any()


@pytest.mark.parametrize("columns", [1, 512, 700])
def test_rows_from_the_host_come_where_they_are_wanted(columns: int) -> None:
    rows = torch.randn(5, columns)
    wanted = torch.tensor([0, 3, 0, 1, 5, 0])
    if CUDA:
        rows, wanted = rows.pin_memory(), wanted.pin_memory()
    outputs = torch.full((6, columns), 7.0, device=DEVICE)
    join(rows, wanted, outputs)
    found = outputs.cpu()
    assert torch.equal(found[[1, 3, 4]], rows[[2, 0, 4]])
    assert (found[[0, 2, 5]] == 7).all()
