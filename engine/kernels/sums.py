# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""Device functions: rows of a matrix as it is stored times a few rows of activations, in fp32.

A thread takes `SPAN` inputs of four rows at a time (of a dense matrix 16 bytes of a row): wide
loads, its scales once, and sums of its own until the end. The order of every sum is fixed by the
geometry and the step.
"""

import triton
import triton.language as tl

from tierrun.engine.kernels import codes
from tierrun.engine.kernels import geometry as _g
from tierrun.engine.kernels.codes import (
    BF16,
    COLUMNS,
    ELEMENT,
    F16,
    GROUP,
    INTERPRETED,
    KIND,
    LOW,
    MINIMUM,
    NO_LEVEL,
    SPAN,
    ZERO_POINT,
)


@triton.jit
def plain(data, kind: tl.constexpr):
    """`data` as a pointer to plain numbers."""
    if kind == BF16:
        return data.to(tl.pointer_type(tl.bfloat16))
    elif kind == F16:
        return data.to(tl.pointer_type(tl.float16))
    else:
        return data.to(tl.pointer_type(tl.float32))


@triton.jit
def row_sums(x, base, rows, M: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr):
    """Each of the `rows` (a tuple of [R]) with each of T rows of `x`: a tuple of [R], tokens last.

    Several of `rows` are summed in step. In each step all loads of weights come first, then a
    barrier, then those of inputs. The barrier is for the assembler, which else moves each load to
    where its result is used, to save registers, so that hardly any are under way together.
    """
    if M[KIND] >= BF16:
        return _dense_sums(x, base, rows, M, T, STEP)
    else:
        return _packed_sums(x, base, rows, M, T, STEP)


@triton.jit
def _packed_sums(x, base, rows, M: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr):
    R: tl.constexpr = rows[0].shape[0]
    N: tl.constexpr = len(rows)
    spans: tl.constexpr = codes.spans(M)
    sums = _zeros(N * T, STEP, R)
    for first in range(0, spans, STEP):
        span = first + tl.arange(0, STEP)[:, None]
        inside = None if spans % STEP == 0 else span < spans
        if spans % STEP != 0:
            span = tl.minimum(span, spans - 1)
        loaded = ()
        for n in tl.static_range(N):
            loaded = loaded + (_span_loads(base, span, rows[n][None, :], M),)
        tl.debug_barrier()
        some = _span_sums(x, span, loaded, M, N, T)
        sums = _added(sums, some, inside, N * T)
    reduced = ()
    for i in tl.static_range(N * T):
        total = tl.sum(sums[i], axis=0)
        reduced = reduced + (codes.row_scaled(total, base, rows[i // T], None, M),)
    return reduced


@triton.jit
def _span_loads(base, span, row, M: tl.constexpr):
    """All that is stored of each `span` [P, 1] of `row` [1, R]: words of low bits, of high bits,
    and per group its scale, zero point and minimum (1 where the codec has none)."""
    low, high = codes.span_words(base, span, row, M)
    groups = ()
    for group in tl.static_range(SPAN // M[GROUP]):
        k = span * SPAN + group * M[GROUP]
        inside = k < M[COLUMNS] if codes.is_ragged(M) else None
        scale, zero_point, minimum = 1.0, 1.0, 1.0
        if codes.has_group_scale(M):
            scale = codes.group_scale(base, k, row, inside, M)
        if M[ZERO_POINT + ELEMENT] != NO_LEVEL:
            zero_point = codes.level(base, k, row, inside, M, ZERO_POINT)
        if M[MINIMUM + ELEMENT] != NO_LEVEL:
            minimum = codes.minimum(base, k, row, inside, M)
        groups = groups + ((scale, zero_point, minimum),)
    return low, high, groups


@triton.jit
def _span_sums(x, span, loaded, M: tl.constexpr, N: tl.constexpr, T: tl.constexpr):
    """The products of the inputs of each `span` with what is `loaded`: N · T of [P, R]."""
    P: tl.constexpr = loaded[0][0][0].shape[0]
    R: tl.constexpr = loaded[0][0][0].shape[1]
    words: tl.constexpr = M[GROUP] * M[LOW] // 32
    total = _zeros(N * T, P, R)
    for group in tl.static_range(SPAN // M[GROUP]):
        sums, inputs = _zeros(N * T, P, R), _zeros(T, P, 1)
        for w in tl.static_range(words):
            sums, inputs = _word_sums(
                sums, inputs, x, span, loaded, group * words + w, M=M, N=N, T=T
            )
        found = ()
        for i in tl.static_range(N * T):
            of_group = loaded[i // T][2][group]
            found = found + (_scaled(total[i], sums[i], inputs[i % T], of_group, M),)
        total = found
    return total


@triton.jit
def _word_sums(
    sums,
    inputs,
    x,
    span,
    loaded,
    word: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
):
    """`sums` and `inputs` with the products of word number `word` of a span, and its inputs."""
    ready = ()
    for n in tl.static_range(N):
        ready = ready + (codes.span_word(loaded[n][0], loaded[n][1], word, M),)
    for quarter in tl.static_range(8 // M[LOW]):
        k = span * SPAN + (word * (32 // M[LOW]) + 4 * quarter)
        xs = _fours(x, k, codes.is_ragged(M), M, T)
        weights = ()
        for n in tl.static_range(N):
            four = ()
            for j in tl.static_range(4):
                four = four + (codes.number(ready[n], 4 * quarter + j, M),)
            weights = weights + (four,)
        sums = _multiplied(sums, weights, xs, N, T)
        plus = ()
        for t in tl.static_range(T):
            plus = plus + (inputs[t] + ((xs[t][0] + xs[t][1]) + (xs[t][2] + xs[t][3])),)
        inputs = plus
    return sums, inputs


@triton.jit
def _scaled(total, value, inputs, group, M: tl.constexpr):
    """`total` plus the values of a group: of its sum of numbers times inputs, and of inputs."""
    scale, zero_point, minimum = group
    if M[ZERO_POINT + ELEMENT] != NO_LEVEL:
        value -= zero_point * inputs
    total += value * scale if codes.has_group_scale(M) else value
    if M[MINIMUM + ELEMENT] != NO_LEVEL:
        total -= minimum * inputs
    return total


@triton.jit
def _dense_sums(x, base, rows, M: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr):
    R: tl.constexpr = rows[0].shape[0]
    N: tl.constexpr = len(rows)
    chunks: tl.constexpr = _chunks(M)
    sums = _zeros(N * T, R, STEP)
    for first in range(0, chunks, STEP):
        chunk = first + tl.arange(0, STEP)[None, :]
        inside = None if chunks % STEP == 0 else chunk < chunks
        if chunks % STEP != 0:
            chunk = tl.minimum(chunk, chunks - 1)
        loaded = ()
        for n in tl.static_range(N):
            loaded = loaded + (_chunk_loads(base, chunk * _chunk(M), rows[n][:, None], M),)
        tl.debug_barrier()
        some = _zeros(N * T, R, STEP)
        for quarter in tl.static_range(_chunk(M) // 4):
            xs = _fours(x, chunk * _chunk(M) + 4 * quarter, _is_broken(M), M, T)
            weights = ()
            for n in tl.static_range(N):
                four = ()
                for j in tl.static_range(4):
                    four = four + (_unpacked(loaded[n], 4 * quarter + j, M),)
                weights = weights + (four,)
            some = _multiplied(some, weights, xs, N, T)
        sums = _added(sums, some, inside, N * T)
    reduced = ()
    for i in tl.static_range(N * T):
        reduced = reduced + (tl.sum(sums[i], axis=1),)
    return reduced


@triton.constexpr_function
def _chunk(M):
    """Numbers in 16 bytes."""
    return 4 if M[_g.KIND] == _g.F32 else 8


@triton.constexpr_function
def _chunks(M):
    """16-byte chunks of a row, the last one short where `_is_broken`."""
    return -(-M[_g.COLUMNS] // _chunk(M))


@triton.constexpr_function
def _is_broken(M):
    """Whether the rows are not whole chunks, so that they are not aligned to them either."""
    return M[_g.COLUMNS] % _chunk(M) != 0


@triton.jit
def _chunk_loads(base, k, row, M: tl.constexpr):
    """The chunk of 16 bytes from input `k` [1, P] on of `row` [R, 1]: four words each, or the
    numbers one by one."""
    start = plain(base, M[KIND]) + (row.to(tl.int64) * M[COLUMNS] + k)
    if INTERPRETED or _is_broken(M):
        loaded = ()
        for j in tl.static_range(_chunk(M)):
            weight = tl.load(start + j, mask=k + j < M[COLUMNS], other=0.0)
            loaded = loaded + (weight.to(tl.float32),)
        return loaded
    else:
        return tl.inline_asm_elementwise(
            "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [start],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def _unpacked(loaded, k: tl.constexpr, M: tl.constexpr):
    """Number `k` of a chunk, fp32."""
    if INTERPRETED or _is_broken(M):
        return loaded[k]
    elif M[KIND] == BF16:
        bits = loaded[k // 2] << 16 if k % 2 == 0 else loaded[k // 2] & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    elif M[KIND] == F16:
        half = (loaded[k // 2] >> (16 * (k % 2))).to(tl.uint16)
        return half.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return loaded[k].to(tl.float32, bitcast=True)


@triton.jit
def _zeros(count: tl.constexpr, first: tl.constexpr, second: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(count):
        zeros = zeros + (tl.zeros([first, second], tl.float32),)
    return zeros


@triton.jit
def _added(sums, some, inside, count: tl.constexpr):
    """`sums` plus `some` where `inside` (None: everywhere)."""
    found = ()
    for i in tl.static_range(count):
        found = found + (sums[i] + (some[i] if inside is None else tl.where(inside, some[i], 0.0)),)
    return found


@triton.jit
def _multiplied(sums, weights, xs, N: tl.constexpr, T: tl.constexpr):
    """`sums` plus four `weights` of each of N times four inputs `xs` of each of T."""
    found = ()
    for i in tl.static_range(N * T):
        w, v = weights[i // T], xs[i % T]
        found = found + (sums[i] + w[0] * v[0] + w[1] * v[1] + w[2] * v[2] + w[3] * v[3],)
    return found


@triton.jit
def _fours(x, k, ragged: tl.constexpr, M: tl.constexpr, T: tl.constexpr):
    """Inputs `k` to `k` + 3 of each row of `x`."""
    found = ()
    for t in tl.static_range(T):
        found = found + (_four(x + t * M[COLUMNS], k, ragged, M),)
    return found


@triton.jit
def _four(x, k, ragged: tl.constexpr, M: tl.constexpr):
    """Inputs `k` to `k` + 3 of a row of `x`; if `ragged` 0 beyond the last one."""
    if ragged:
        x0 = tl.load(x + k, mask=k < M[COLUMNS], other=0.0)
        x1 = tl.load(x + (k + 1), mask=k + 1 < M[COLUMNS], other=0.0)
        x2 = tl.load(x + (k + 2), mask=k + 2 < M[COLUMNS], other=0.0)
        x3 = tl.load(x + (k + 3), mask=k + 3 < M[COLUMNS], other=0.0)
        return x0, x1, x2, x3
    elif INTERPRETED:
        x0, x1 = tl.load(x + k), tl.load(x + (k + 1))
        return x0, x1, tl.load(x + (k + 2)), tl.load(x + (k + 3))
    else:  # one load, by every thread that needs them: no exchange through shared memory
        return tl.inline_asm_elementwise(
            "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,l",
            [x + k],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
