# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A whole decoder layer for one token in compiled code: all up to its experts, and these.

Between two layers the machine has read megabytes of weights, and finds little of Python in its
caches: what counts is how much code a layer goes through, not how fast it is when it is warm.
`token_run.py` goes through one layer after another.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from tierrun.engine.kernels.jit import njit
from tierrun.engine.kernels.native import put_real, real, word
from tierrun.engine.kernels.reals import rms_norm
from tierrun.engine.kernels.token_attention import TokenAttention, attend
from tierrun.engine.kernels.token_experts import begin_experts, finish_experts
from tierrun.engine.kernels.token_router import TokenRouter, route
from tierrun.engine.recognise import RmsNorm

if TYPE_CHECKING:
    from tierrun.engine.kernels.token_experts import TokenExperts

(
    _SIZE, _FIRST, _FIRST_EPS, _ATTENTION, _SECOND, _SECOND_EPS, _ROUTER, _SUM, _HIDDEN, _LOGITS,
    _SCORES, _CHOSEN, _TOP_K,
) = range(0, 8 * 13, 8)  # fmt: skip


ABSENT, BEGUN, LACKING = 0, 1, 2
"""What `begin_layer` returns."""


class TokenLayer:
    """A layer that normalises, attends and adds, normalises, routes, and adds its experts' sum.

    `hidden` [1, H], `chosen` and `scores` [1, k] are what its experts were last given, and `sum`
    [1, H] what their output is added to.
    """

    def __init__(
        self, first: RmsNorm, attention: TokenAttention, second: RmsNorm, router: TokenRouter
    ) -> None:
        size = attention.columns
        self._kept = first, attention, second, router
        self.workers = router.workers
        self.attention, self.columns = attention, size
        self.sum, self.hidden = torch.zeros(1, size), torch.zeros(1, size)
        self.scores = torch.zeros(1, router.top_k)
        self.chosen = torch.zeros(1, router.top_k, dtype=torch.int64)
        self._logits = torch.zeros(router.experts)
        words = [size, first.scale.data_ptr(), 0, attention.address, second.scale.data_ptr(), 0]
        words += [router.address, self.sum.data_ptr(), self.hidden.data_ptr()]
        words += [x.data_ptr() for x in (self._logits, self.scores, self.chosen)]
        words.append(router.top_k)
        self._table = np.array(words, np.int64)
        numbers = self._table.view(np.float32)
        numbers[_FIRST_EPS // 4], numbers[_SECOND_EPS // 4] = first.eps, second.eps
        self.address: int = self._table.ctypes.data

    def finish(self, experts: "TokenExperts") -> torch.Tensor:
        """The layer's output, a new tensor [1, H], where `experts` have begun; releases the threads
        that somebody claimed."""
        y = torch.empty(1, self.columns)
        finish_layer(self.address, experts.address, y.data_ptr())
        self.workers.release()
        return y


@njit("void(int64, int64, int64, int64)", nogil=True, cache=True)
def _add(a, b, count, target):
    for i in range(count):
        put_real(target + 4 * i, real(a + 4 * i) + real(b + 4 * i))


@njit("boolean(int64, int64, int64)", nogil=True, cache=True)
def _lacks(layer, hidden, addresses):
    """Whether something is absent of what `layer` would choose for `hidden`."""
    scores, chosen = word(layer + _SCORES), word(layer + _CHOSEN)
    route(word(layer + _ROUTER), hidden, word(layer + _LOGITS), scores, chosen, False)
    for i in range(word(layer + _TOP_K)):
        if word(addresses + 8 * word(chosen + 8 * i)) == 0:
            return True
    return False


@njit("int64(" + ", ".join(["int64"] * 11) + ")", nogil=True, cache=True)
def begin_layer(
    layer, x, cosines, sines, keys, values, room, length, experts, following, addresses
):  # fmt: skip
    """Token `x` fp32 [H] at position `length`, as `TokenAttention`; then the threads begin to
    compute `experts` (0: none), which `finish_layer` must follow. ABSENT where they do not: the
    caller sees to them.

    Meanwhile the router of the `following` layer is asked what it would choose here: LACKING if
    some of it is not at `addresses`, those of that layer's experts (0: nothing can be read for it),
    or if there is no router that could be asked (0).
    """
    size, hidden, both = word(layer + _SIZE), word(layer + _HIDDEN), word(layer + _SUM)
    rms_norm(x, word(layer + _FIRST), 1, size, real(layer + _FIRST_EPS), hidden)
    attend(word(layer + _ATTENTION), hidden, cosines, sines, keys, values, room, length, both)
    _add(x, both, size, both)
    rms_norm(both, word(layer + _SECOND), 1, size, real(layer + _SECOND_EPS), hidden)
    scores, chosen = word(layer + _SCORES), word(layer + _CHOSEN)
    route(word(layer + _ROUTER), hidden, word(layer + _LOGITS), scores, chosen, True)
    if experts == 0 or not begin_experts(experts, hidden, chosen):
        return ABSENT
    if addresses != 0 and (following == 0 or _lacks(following, hidden, addresses)):
        return LACKING
    return BEGUN


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def finish_layer(layer, experts, target):
    """Wait for `experts`; the layer's output is put at `target`."""
    finish_experts(experts, word(layer + _SCORES), target)
    _add(word(layer + _SUM), target, word(layer + _SIZE), target)
