# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""An attention module for one token, in one compiled call: queries, keys and values, their norms,
rotation by halves, the cache, the heads, and the product with what comes of them.

Keys are taken in spans of a fixed length, so that results depend on no number of threads.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numba import types

from tierrun.engine.kernels.jit import cfunc, njit
from tierrun.engine.kernels.native import put_real, put_word, real, word
from tierrun.engine.kernels.reals import add_times, dot, exponentials, reals, rms_norm
from tierrun.engine.kernels.token_products import TokenProducts, multiply
from tierrun.engine.kernels.workers import begin, finish
from tierrun.engine.recognise import RmsNorm

if TYPE_CHECKING:
    from numpy.typing import NDArray

(
    _STATE, _PERFORM, _HEADS, _KV_HEADS, _SIZE, _SCALE, _PROJECT, _RETURN, _QKV, _MIXED, _PARTS,
    _Q_NORM, _Q_ROWS, _K_NORM, _K_ROWS, _EPS, _ROTATED, _KEYS, _VALUES, _STRIDE, _LENGTH, _SPANS,
) = range(0, 8 * 22, 8)  # fmt: skip
_WORDS = 22
SPAN = 256
"""Positions of a task."""
_ALONE = 64
"""Positions up to which waking other threads costs more than it brings."""


class Heads(NamedTuple):
    """Of one attention module: how many of queries and of keys, their size, what scores are
    multiplied by, and the first how many of a head's numbers are rotated."""

    queries: int
    keys: int
    size: int
    scale: float
    rotated: int


class TokenAttention:
    """What one module does with a token; `project` gives queries, keys and values side by side."""

    def __init__(
        self,
        heads: Heads,
        project: TokenProducts,
        back: TokenProducts,
        query_norm: RmsNorm | None,
        key_norm: RmsNorm | None,
    ) -> None:
        assert project.rows == (heads.queries + 2 * heads.keys) * heads.size
        self.heads, self.columns, self.rows = heads, project.columns, back.rows
        self._products = project, back
        self._norms = query_norm, key_norm
        self._workers = project.workers
        self._qkv = np.zeros(project.rows, np.float32)
        self._mixed = np.zeros(back.columns, np.float32)
        self._parts = np.zeros(0, np.float32)
        words = np.zeros(_WORDS, np.int64)
        words[: _Q_NORM // 8] = (
            *(project.workers.state, perform().address, heads.queries, heads.keys, heads.size, 0),
            *(project.address, back.address, self._qkv.ctypes.data, self._mixed.ctypes.data, 0),
        )
        numbers = words.view(np.float32)
        numbers[_SCALE // 4] = heads.scale
        words[_ROTATED // 8] = heads.rotated
        self._table, self.address = words, int(words.ctypes.data)
        self._note_norms(numbers, query_norm, key_norm)

    def _note_norms(
        self, numbers: "NDArray[np.float32]", query: RmsNorm | None, key: RmsNorm | None
    ) -> None:
        eps = {norm.eps for norm in (query, key) if norm is not None}
        assert len(eps) < 2, "norms of different kinds"
        numbers[_EPS // 4] = eps.pop() if eps else 0.0
        counts = self.heads.queries, self.heads.keys
        for at, norm, heads in zip((_Q_NORM, _K_NORM), (query, key), counts, strict=True):
            if norm is not None:
                self._table[at // 8] = norm.scale.data_ptr()
                self._table[at // 8 + 1] = heads * self.heads.size // norm.scale.numel()

    def takes(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether these are one token, and rotate as much as expected."""
        return (
            x.numel() == self.columns
            and x.is_contiguous()
            and all(
                part.numel() == self.heads.rotated and part.is_contiguous() for part in rotation
            )
        )

    def __call__(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        length: int,
    ) -> torch.Tensor:
        """`x` fp32 [in] at position `length`, to `rotation` (cosines and sines): fp32 [out].

        `cache` is keys and values, fp32 [1, heads, room, size]; the token's own are added to it.
        """
        keys, values = cache
        self.reserve(length)
        y = torch.empty(self.rows)
        self._workers.claim()
        attend(
            self.address,
            x.data_ptr(),
            rotation[0].data_ptr(),
            rotation[1].data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[2],
            length,
            y.data_ptr(),
        )
        self._workers.release()
        return y

    def reserve(self, length: int) -> None:
        """Room for what heads find in each span up to `length` (sums, largest score, weight), and
        its scores."""
        spans = length // SPAN + 1
        wanted = spans * self.heads.queries * (self.heads.size + 2 + SPAN)
        if len(self._parts) < wanted:
            self._parts = np.zeros(2 * wanted, np.float32)
            self._table[_PARTS // 8] = self._parts.ctypes.data


@njit("void(int64, int64, int64, int64)", nogil=True, cache=True)
def _rotate(head, half, cosines, sines):
    """Rotate pairs of numbers half a row apart."""
    for i in range(half):
        a, b = real(head + 4 * i), real(head + 4 * (i + half))
        first = a * real(cosines + 4 * i) - b * real(sines + 4 * i)
        second = b * real(cosines + 4 * (i + half)) + a * real(sines + 4 * (i + half))
        put_real(head + 4 * i, first)
        put_real(head + 4 * (i + half), second)


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def _copy(source, target, count):
    given, to = reals(source, count), reals(target, count)
    for i in range(count):
        to[i] = given[i]


@njit("void(int64, int64, int64, int64)", nogil=True, cache=True)
def _append(table, keys, values, position):
    """The token's keys and values, to their place in the cache."""
    size, stride = word(table + _SIZE), word(table + _STRIDE)
    for head in range(word(table + _KV_HEADS)):
        to = 4 * (stride * head + size * position)
        _copy(keys + 4 * size * head, word(table + _KEYS) + to, size)
        _copy(values + 4 * size * head, word(table + _VALUES) + to, size)


@njit("int64(int64, int64, int64)", nogil=True, cache=True)
def _part(table, head, span):
    """Where what `head` found in `span` is: its sums, then the largest score and the weight."""
    row = word(table + _SIZE) + 2
    return word(table + _PARTS) + 4 * row * (word(table + _SPANS) * head + span)


def _task(table, task):
    """One span of positions for all queries of one head of keys."""
    size, spans = word(table + _SIZE), word(table + _SPANS)
    kv_head, span = task // spans, task % spans
    group = word(table + _HEADS) // word(table + _KV_HEADS)
    first = SPAN * span
    count = min(SPAN, word(table + _LENGTH) - first)
    at = 4 * (word(table + _STRIDE) * kv_head + size * first)
    keys, values = word(table + _KEYS) + at, word(table + _VALUES) + at
    scale = real(table + _SCALE)
    # scores lie behind the parts of all heads, each task's own
    scratch = _part(table, word(table + _HEADS), 0) + 4 * SPAN * group * task
    for position in range(count):
        for g in range(group):
            query = word(table + _QKV) + 4 * size * (group * kv_head + g)
            score = dot(query, keys + 4 * size * position, size) * scale
            put_real(scratch + 4 * (SPAN * g + position), score)
    for g in range(group):
        part, scores = _part(table, group * kv_head + g, span), scratch + 4 * SPAN * g
        most = real(scores)
        for position in range(1, count):
            most = max(most, real(scores + 4 * position))
        put_real(part + 4 * size, most)
        put_real(part + 4 * (size + 1), exponentials(scores, most, count))
        for i in range(size):
            put_real(part + 4 * i, types.float32(0))
    for position in range(count):
        for g in range(group):
            part = _part(table, group * kv_head + g, span)
            weight = real(scratch + 4 * (SPAN * g + position))
            add_times(part, weight, values + 4 * size * position, size)


_here = njit("void(int64, int64)", nogil=True, cache=True)(_task)


@lru_cache
def perform() -> Any:
    """What threads call for a task."""
    return cfunc("void(int64, int64)", cache=True)(_task)


@njit("void(int64)", nogil=True, cache=True)
def _join(table):
    """The spans' sums, each scaled to the largest score of all, in their order."""
    size, spans, mixed = word(table + _SIZE), word(table + _SPANS), word(table + _MIXED)
    for head in range(word(table + _HEADS)):
        most = real(_part(table, head, 0) + 4 * size)
        for span in range(1, spans):
            most = max(most, real(_part(table, head, span) + 4 * size))
        whole, to = types.float32(0), mixed + 4 * size * head
        for i in range(size):
            put_real(to + 4 * i, types.float32(0))
        for span in range(spans):
            part = _part(table, head, span)
            put_real(part + 4 * size, real(part + 4 * size) - most)
            scale = exponentials(part + 4 * size, types.float32(0), 1)
            whole += scale * real(part + 4 * (size + 1))
            add_times(to, scale, part, size)
        for i in range(size):
            put_real(to + 4 * i, real(to + 4 * i) / whole)


@njit("void(" + ", ".join(["int64"] * 9) + ")", nogil=True, cache=True)
def attend(table, source, cosines, sines, keys, values, room, length, target):
    """See `TokenAttention`."""
    heads, kv_heads, size = word(table + _HEADS), word(table + _KV_HEADS), word(table + _SIZE)
    queries = word(table + _QKV)
    own_keys = queries + 4 * size * heads
    own_values = own_keys + 4 * size * kv_heads
    multiply(word(table + _PROJECT), source, queries)
    eps = real(table + _EPS)
    if word(table + _Q_NORM) != 0:
        rows = word(table + _Q_ROWS)
        rms_norm(queries, word(table + _Q_NORM), rows, size * heads // rows, eps, queries)
    if word(table + _K_NORM) != 0:
        rows = word(table + _K_ROWS)
        rms_norm(own_keys, word(table + _K_NORM), rows, size * kv_heads // rows, eps, own_keys)
    half = word(table + _ROTATED) // 2
    for head in range(heads + kv_heads):
        _rotate(queries + 4 * size * head, half, cosines, sines)
    put_word(table + _KEYS, keys)
    put_word(table + _VALUES, values)
    put_word(table + _STRIDE, room * size)
    put_word(table + _LENGTH, length + 1)
    put_word(table + _SPANS, length // SPAN + 1)
    _append(table, own_keys, own_values, length)
    tasks = kv_heads * word(table + _SPANS)
    if length < _ALONE:
        for task in range(tasks):
            _here(table, task)
    else:
        begin(word(table + _STATE), word(table + _PERFORM), table, tasks)
        finish(word(table + _STATE))
    _join(table)
    multiply(word(table + _RETURN), word(table + _MIXED), target)
