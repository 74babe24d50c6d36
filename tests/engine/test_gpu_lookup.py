"""The device looks up, and tells the host."""

import numpy as np
import pytest
import torch

from tierrun.engine.gpu.letters import Letter, Mailboxes
from tierrun.engine.kernels.join import join
from tierrun.engine.kernels.lookup import look_up, look_up_late
from tierrun.tiers.slottable import ABSENT, FOR_HOST, IN_PLACE, KIND

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def read(boxes: Mailboxes, layer: int, count: int) -> Letter:
    found = boxes.answer(layer, count, count, 0, np.zeros(200, np.int64))
    assert found >= 0
    letter = boxes.letter(layer, count)
    if not found:
        noted = boxes.noted()
        assert np.array_equal(noted.experts, letter.experts)
        assert np.array_equal(noted.entries, letter.entries)
    return letter


def numbers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def a_table() -> torch.Tensor:
    """100 experts: absent, in VRAM, and in RAM (above the slab and below it) in turn."""
    offsets = torch.arange(-50, 50, dtype=torch.int64) * 4096
    offsets[::3] = ABSENT
    offsets[1::3] = offsets[1::3].abs()
    offsets[2::3] += IN_PLACE
    return offsets.to(DEVICE)


@pytest.mark.parametrize("count", [1, 8, 13, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_slots_come_back_and_the_letter_arrives(count: int, share: float) -> None:
    boxes = Mailboxes(num_layers=3, assignments=64, pinned=CUDA)
    table, shares = a_table(), numbers([int(share * number) for number in range(65)])
    for _ in range(3):  # a mailbox is used again and again
        experts = torch.randint(0, 100, (count,), device=DEVICE)
        slots = torch.empty(count, dtype=torch.int64, device=DEVICE)
        look_up(table, experts, slots, boxes.memory(1), shares)
        letter = read(boxes, 1, count)
        assert np.array_equal(letter.experts, experts.cpu().numpy())
        assert not boxes.memory(1)[0]
        said = table[experts].cpu().numpy()
        in_ram = np.flatnonzero(said & KIND == IN_PLACE)
        kept = in_ram[: len(in_ram) - int(share * len(in_ram))]
        said[np.setdiff1d(in_ram, kept)] += FOR_HOST - IN_PLACE
        assert np.array_equal(letter.entries, said), "the last ones are the CPU's"
        said[kept] -= IN_PLACE
        assert np.array_equal(slots.cpu().numpy(), said)


def test_what_comes_late_is_found_once() -> None:
    table = numbers([ABSENT, 4096, ABSENT, -8192 + IN_PLACE, ABSENT])
    experts = numbers([0, 1, 2, 3, 4, 0])
    slots = numbers([ABSENT, 4096, ABSENT, -8192 + FOR_HOST, ABSENT, ABSENT])
    found = torch.empty_like(slots)
    look_up_late(table, experts, slots, found)
    assert found.tolist() == [-1] * 6
    table[0], table[2] = 12288, -4096 + IN_PLACE
    look_up_late(table, experts, slots, found)
    assert found.tolist() == [12288, -1, -4096, -1, -1, 12288]
    assert slots.tolist() == [12288, 4096, -4096, -8192 + FOR_HOST, ABSENT, 12288]
    look_up_late(table, experts, slots, found)
    assert found.tolist() == [-1] * 6


def test_a_journal_that_nobody_reads_is_no_broken_memory() -> None:
    boxes = Mailboxes(num_layers=1, assignments=4, pinned=CUDA)
    for _ in range(2):
        boxes.memory(0)[0] = 1
        boxes.answer(0, 4, 4, 0, np.zeros(8, np.int64))
    boxes.memory(0)[0] = 1
    with pytest.raises(OverflowError, match="journal"):
        boxes.answer(0, 4, 4, 0, np.zeros(8, np.int64))


def test_a_forward_pass_broken_off_leaves_no_letter() -> None:
    boxes = Mailboxes(num_layers=2, assignments=4, pinned=CUDA)
    boxes.memory(0)[0] = 1
    boxes.clear()
    assert not boxes.memory(0)[0]


@pytest.mark.parametrize(("tokens", "size"), [(1, 96), (3, 1000), (8, 2048)])
def test_the_input_arrives_with_the_letter(tokens: int, size: int) -> None:
    boxes = Mailboxes(num_layers=1, assignments=16, pinned=CUDA)
    table = torch.arange(32, dtype=torch.int64, device=DEVICE) * 64 + IN_PLACE
    copy = torch.zeros(8 * size, pin_memory=CUDA)
    for seed in range(4):
        shares = numbers([min(number, seed) for number in range(17)])
        before = copy.clone()
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, size, generator=generator).to(DEVICE)
        experts = torch.randint(0, 32, (tokens, 2), device=DEVICE)
        slots = torch.empty(2 * tokens, dtype=torch.int64, device=DEVICE)
        look_up(table, experts, slots, boxes.memory(0), shares, hidden, copy)
        read(boxes, 0, 2 * tokens)
        if seed == 0:
            assert torch.equal(copy, before), "the CPU has no part in it"
            continue
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
