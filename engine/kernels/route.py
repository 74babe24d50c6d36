# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""From a router's logits to the chosen experts and their weights, in one launch."""

import torch
import triton
import triton.language as tl


def choose(
    logits: torch.Tensor, top_k: int, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` largest of the softmax of `logits` fp32 [T, E], in descending order.

    Returns their probabilities, fp32 [T, k], divided by their sum where `renormalise`; and which
    they are, int64 [T, k]. Of equal ones the first comes first.
    """
    tokens, experts = logits.shape
    scores = logits.new_empty(tokens, top_k)
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    _choose[(tokens,)](
        logits,
        scores,
        indices,
        experts,
        K=top_k,
        RENORMALISE=renormalise,
        BLOCK=triton.next_power_of_2(experts),
        SLOTS=triton.next_power_of_2(top_k),
        num_warps=1 if experts <= 256 else 4,
    )
    return scores, indices


@triton.jit
def _choose(
    logits,
    scores,
    indices,
    experts,
    K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    token = tl.program_id(0)
    place, slot = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    found = tl.load(logits + token * experts + place, mask=place < experts, other=-float("inf"))
    weight = tl.exp(found - tl.max(found, axis=0))
    left = weight / tl.sum(weight, axis=0)
    left = tl.where(place < experts, left, -1.0)
    best = tl.zeros([SLOTS], tl.float32)
    which = tl.zeros([SLOTS], tl.int64)
    for i in tl.static_range(K):
        expert = tl.argmax(left, axis=0, tie_break_left=True)
        best = tl.where(slot == i, tl.max(left, axis=0), best)
        which = tl.where(slot == i, expert.to(tl.int64), which)
        left = tl.where(place == expert, -1.0, left)
    if RENORMALISE:
        best = best / tl.sum(best, axis=0)
    tl.store(scores + token * K + slot, best, mask=slot < K)
    tl.store(indices + token * K + slot, which, mask=slot < K)
