# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Where the experts lie that a router chose: asked on the device, told to the host.

The answer goes into device memory, where the next kernels read it, and into a *mailbox* in pinned
host memory, which the host polls: a few microseconds, where waiting for an event takes twenty.

What the host still has to see to (reads, copies, what the CPU computes) is looked up a second time,
`look_up_late`, when it has come. See `tierrun.tiers.slottable` for what an entry says.
"""

import torch
import triton
import triton.language as tl

MAILBOX_HEAD = 1
"""Elements of a mailbox before its contents: the flag."""

_KIND = tl.constexpr(7)
_IN_PLACE, _FOR_HOST, _ABSENT = tl.constexpr(2), tl.constexpr(3), tl.constexpr(7)
"""Low bits of an entry: none are set where VRAM has the record."""


def mailbox_elements(assignments: int) -> int:
    """int64 elements of a mailbox for so many assignments: the flag, experts, entries."""
    return MAILBOX_HEAD + 2 * assignments


def look_up(
    table: torch.Tensor,
    experts: torch.Tensor,
    slots: torch.Tensor,
    mailbox: torch.Tensor,
    shares: torch.Tensor,
    hidden: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
) -> None:
    """Find each expert; write its slot, and tell the host: the entries, then the flag, which is 1.

    Of n assignments whose records the device can read in RAM, the last `shares[n]` are left to the
    host's CPU. `slots` gets byte offsets, odd where there is nothing for the device to read.

    With `hidden` (fp32, contiguous) it is written to `copy` (pinned, as long at least) before the
    flag, if the CPU has a part: the host has it as soon as it has the letter.

    Args:
        table: int64, the entries of one layer's experts, on the device or pinned.
        experts: int64, contiguous, [assignments]; `slots` alike.
        mailbox: pinned host memory, `mailbox_elements` long; the host sets the flag back to 0.
        shares: int64, longer than `assignments`, on the device or pinned.
    """
    count = experts.numel()
    numbers = 0 if hidden is None else hidden.numel()
    _look_up[(1,)](
        table,
        experts,
        slots,
        mailbox,
        shares,
        count,
        hidden,
        copy,
        NUMBERS=numbers,
        BLOCK=triton.next_power_of_2(count),
        CHUNK=2048,
        num_warps=1 if hidden is None else 4,
    )


def look_up_late(
    table: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor, found: torch.Tensor
) -> None:
    """Find what was absent; `found` gets the slots of what is there now and was not before.

    They are in `slots` from now on; what is left to the CPU stays so. int64, as in `look_up`.
    """
    count = experts.numel()
    block = triton.next_power_of_2(count)
    _look_up_late[(1,)](table, experts, slots, found, count, BLOCK=block, num_warps=1)


@triton.jit
def _look_up(
    table,
    experts,
    slots,
    mailbox,
    shares,
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
    entry = tl.load(table + expert, mask=inside, other=-1)
    in_place = ((entry & _KIND) == _IN_PLACE).to(tl.int32)
    number = tl.sum(in_place)
    kept = number - tl.load(shares + number).to(tl.int32)
    entry |= (in_place & (tl.cumsum(in_place) > kept).to(tl.int32)).to(tl.int64)
    slot = tl.where((entry & _KIND) == _IN_PLACE, entry - _IN_PLACE, entry)
    tl.store(slots + place, slot, mask=inside)
    tl.store(mailbox + 1 + place, expert, mask=inside)
    tl.store(mailbox + 1 + count + place, entry, mask=inside)
    if hidden is not None:
        if tl.sum(((entry & _KIND) == _FOR_HOST).to(tl.int32)) > 0:
            for first in range(0, NUMBERS, CHUNK):
                element = first + tl.arange(0, CHUNK)
                value = tl.load(hidden + element, mask=element < NUMBERS)
                tl.store(copy + element, value, mask=element < NUMBERS)
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    tl.atomic_xchg(mailbox, 1, sem="release", scope="sys")


@triton.jit
def _look_up_late(table, experts, slots, found, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    inside = place < count
    expert = tl.load(experts + place, mask=inside, other=0)
    before = tl.load(slots + place, mask=inside, other=0)
    entry = tl.load(table + expert, mask=inside, other=-1)
    entry = tl.where((entry & _KIND) == _IN_PLACE, entry - _IN_PLACE, entry)
    new = ((before & _KIND) == _ABSENT) & ((entry & 1) == 0)
    tl.store(found + place, tl.where(new, entry, -1), mask=inside)
    tl.store(slots + place, tl.where(new, entry, before), mask=inside)
