# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Decoder layers of a token, one after another in one compiled call, as far as their experts are in
RAM: where something must be read, Python sees to it and goes on behind it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tierrun.engine.kernels.jit import njit
from tierrun.engine.kernels.native import word
from tierrun.engine.kernels.token_experts import TokenExperts
from tierrun.engine.kernels.token_layer import ABSENT, BEGUN, TokenLayer, begin_layer, finish_layer

_LAYER, _OUT, _EXPERTS, _ADDRESSES, _KEYS, _VALUES, _ROOM = range(0, 56, 8)
_ROW = 64


class Stop(NamedTuple):
    """Where a call ended: in layer `layer`, whose experts are ABSENT, or which is LACKING some of
    what comes next, or which is through (BEGUN and finished)."""

    layer: int
    found: int


class TokenRun:
    """Layers of one width, each of which is given what the one before it gives.

    `outputs` [1, 1, H] are what each of them gave, until it computes again.
    """

    def __init__(self, layers: Sequence[TokenLayer]) -> None:
        self._layers, self._workers = layers, layers[0].workers
        self.outputs = list(torch.zeros(len(layers), 1, 1, layers[0].columns))
        self._table = np.zeros((len(layers) + 1, _ROW // 8), np.int64)  # behind the last: no layer
        for row, layer, out in zip(self._table, layers, self.outputs, strict=False):
            row[_LAYER // 8], row[_OUT // 8] = layer.address, out.data_ptr()

    def prepare(
        self,
        layer: int,
        cache: tuple[torch.Tensor, torch.Tensor],
        length: int,
        experts: TokenExperts | None,
        addresses: int,
    ) -> None:
        """For the next call: `cache` is as in `TokenAttention`; `experts` compute those of `layer`
        if they are there, and those of the layer after it may be read ahead where `addresses` (0:
        not) says that they are not there."""
        self._layers[layer].attention.reserve(length)
        keys, values = cache
        self._table[layer, _EXPERTS // 8 : _ROOM // 8 + 1] = (
            *(0 if experts is None else experts.address, addresses),
            *(keys.data_ptr(), values.data_ptr(), keys.shape[2]),
        )

    def through(
        self,
        first: int,
        last: int,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        length: int,
    ) -> Stop:
        """`x` fp32 [H] at position `length` through layers `first` … `last`, all of them prepared.

        Where it ends LACKING, the layer's experts have begun: its `finish` must follow, and until
        then the threads are claimed.
        """
        self._workers.claim()
        table, source = self._table.ctypes.data, x.data_ptr()
        cosines, sines = rotation[0].data_ptr(), rotation[1].data_ptr()
        found = _through(table, first, last, source, cosines, sines, length)
        stop = Stop(*divmod(found, 4))
        if stop.found in (ABSENT, BEGUN):
            self._workers.release()
        return stop


@njit("int64(" + ", ".join(["int64"] * 7) + ")", nogil=True, cache=True)
def _through(table, first, last, x, cosines, sines, length):
    """4 times the layer it ends in, and what `begin_layer` found there."""
    for i in range(first, last + 1):
        row = table + _ROW * i
        layer, experts = word(row + _LAYER), word(row + _EXPERTS)
        keys, values, room = word(row + _KEYS), word(row + _VALUES), word(row + _ROOM)
        following, addresses = word(row + _ROW + _LAYER), word(row + _ADDRESSES)
        found = begin_layer(
            layer, x, cosines, sines, keys, values, room, length, experts, following, addresses
        )
        if found != BEGUN:
            return 4 * i + found
        x = word(row + _OUT)
        finish_layer(layer, experts, x)
    return 4 * last + BEGUN
