# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Which of the experts that a router chose lie in VRAM: asked on the device, told to the host.

The answer goes into device memory, where the next kernels read it, and into a *mailbox* in pinned
host memory, which the host polls: a few microseconds, where waiting for an event takes twenty.
"""

import torch
import triton
import triton.language as tl

MAILBOX_HEAD = 1
"""Elements of a mailbox before its contents: the flag."""


def mailbox_elements(assignments: int) -> int:
    """int64 elements of a mailbox for so many assignments: the flag, experts, slots."""
    return MAILBOX_HEAD + 2 * assignments


def look_up(
    table: torch.Tensor,
    experts: torch.Tensor,
    slots: torch.Tensor,
    mailbox: torch.Tensor,
    hidden: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> None:
    """`slots[i] = table[experts[i]]`, all int64; then both into `mailbox`, then its flag is 1.

    With `hidden` (fp32, contiguous) it is written to `copy` (pinned, as long at least) before the
    flag: the host has it as soon as it has the letter.

    Args:
        table: byte offset of each expert of one layer in VRAM, −1 where it is not there.
        experts: contiguous, [assignments]; `slots` alike.
        mailbox: pinned host memory, `mailbox_elements` long; the host sets the flag back to 0.
    """
    count = experts.numel()
    numbers = 0 if hidden is None else hidden.numel()
    _look_up[(1,)](
        table,
        experts,
        slots,
        mailbox,
        count,
        hidden,
        copy,
        NUMBERS=numbers,
        BLOCK=triton.next_power_of_2(count),
        CHUNK=2048,
        num_warps=1 if hidden is None else 4,
    )


@triton.jit
def _look_up(
    table,
    experts,
    slots,
    mailbox,
    count,
    hidden,
    copy,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    place = tl.arange(0, BLOCK)
    inside = place < count
    expert = tl.load(experts + place, mask=inside, other=0)
    slot = tl.load(table + expert, mask=inside, other=-1)
    tl.store(slots + place, slot, mask=inside)
    tl.store(mailbox + 1 + place, expert, mask=inside)
    tl.store(mailbox + 1 + count + place, slot, mask=inside)
    if hidden is not None:
        for first in range(0, NUMBERS, CHUNK):
            number = first + tl.arange(0, CHUNK)
            value = tl.load(hidden + number, mask=number < NUMBERS)
            tl.store(copy + number, value, mask=number < NUMBERS)
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    tl.atomic_xchg(mailbox, 1, sem="release", scope="sys")
