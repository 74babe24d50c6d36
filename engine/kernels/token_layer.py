# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A whole decoder layer for one token in two compiled calls: all up to its experts, and these.

Between two layers the machine has read megabytes of weights, and finds little of Python in its
caches: what counts is how much code a layer goes through, not how fast it is when it is warm.
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
"""What `TokenLayer.begin` returns."""


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
        self._workers = router.workers
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

    def begin(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        length: int,
        experts: "TokenExperts | None",
        following: "TokenLayer | None",
        addresses: int,
    ) -> int:
        """`x` fp32 [H] at position `length`, as `TokenAttention`; then let the threads compute
        `experts`, which `finish` must follow. ABSENT where they do not: the caller sees to them.

        Meanwhile the router of the `following` layer is asked what it would choose here: LACKING if
        some of it is not at `addresses`, those of that layer's experts (0: do not ask).
        """
        self.attention.reserve(length)
        keys, values = cache
        self._workers.claim()
        found: int = _begin(
            self.address,
            x.data_ptr(),
            rotation[0].data_ptr(),
            rotation[1].data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[2],
            length,
            0 if experts is None else experts.address,
            0 if following is None else following.address,
            addresses,
        )
        if found == ABSENT:
            self._workers.release()
        return found

    def finish(self, experts: "TokenExperts") -> torch.Tensor:
        """The layer's output, a new tensor [H]."""
        y = torch.empty(self.columns)
        _finish(self.address, experts.address, y.data_ptr())
        self._workers.release()
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
def _begin(
    layer, x, cosines, sines, keys, values, room, length, experts, following, addresses
):  # fmt: skip
    size, hidden, both = word(layer + _SIZE), word(layer + _HIDDEN), word(layer + _SUM)
    rms_norm(x, word(layer + _FIRST), 1, size, real(layer + _FIRST_EPS), hidden)
    attend(word(layer + _ATTENTION), hidden, cosines, sines, keys, values, room, length, both)
    _add(x, both, size, both)
    rms_norm(both, word(layer + _SECOND), 1, size, real(layer + _SECOND_EPS), hidden)
    scores, chosen = word(layer + _SCORES), word(layer + _CHOSEN)
    route(word(layer + _ROUTER), hidden, word(layer + _LOGITS), scores, chosen, True)
    if experts == 0 or not begin_experts(experts, hidden, chosen):
        return ABSENT
    if following != 0 and addresses != 0 and _lacks(following, hidden, addresses):
        return LACKING
    return BEGUN


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def _finish(layer, experts, target):
    finish_experts(experts, word(layer + _SCORES), target)
    _add(word(layer + _SUM), target, word(layer + _SIZE), target)
