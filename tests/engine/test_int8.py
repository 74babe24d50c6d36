"""int8 kernels: every way gives the bits of the plain one, and what that gives is right."""

import platform
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding, ir
from numba import njit
from numpy.typing import NDArray
from tests.codecs import NAMES, random_fields

from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import Fields, pack
from tierrun.engine.gpu.activations import apply_gate
from tierrun.engine.kernels import int8_amx, int8_many, int8_panel, int8_tasks, int8_tile
from tierrun.engine.kernels.geometry import packed_geometry
from tierrun.engine.kernels.host_product import Product
from tierrun.engine.kernels.int8 import FEW_TOKENS, obstacle
from tierrun.engine.kernels.int8_dots import AMX, AVX2, NEON, PLAIN, VNNI, VNNI_512, Way, possible
from tierrun.engine.kernels.int8_gates import gated_block
from tierrun.engine.kernels.int8_linear import Int8Linear
from tierrun.engine.kernels.int8_rows import (
    BLOCK,
    BLOCK_BYTES,
    PANEL,
    panel_bytes,
    quantise_row,
)
from tierrun.engine.kernels.lanes import BYTE, I64
from tierrun.engine.kernels.matvec import GATES, Gate
from tierrun.engine.kernels.native import at
from tierrun.engine.kernels.workers import workers

CODECS = [
    name
    for name in (*NAMES, "int4z_g128_f16", "int8z_g32_f16", "int4_row_f32", "int8_g64_f16")
    if obstacle(packed_geometry(find_codec(name), (32, 256))) is None
]
OF_EACH_KIND = ("q4_k", "q6_k", "q8_0", "mxfp4", "iq4_nl", "int8z_g32_f16")
"""Codecs that differ in what a way does: levels, halves of spans, signs, books, zero points."""
FAST = [way for way in possible(int8_tasks.host_features(), panels=False) if way != PLAIN]
OF_PANELS = possible(int8_tasks.host_features(), panels=True)
BEST = possible(int8_tasks.host_features(), panels=False)[0]
"""The way of codecs that are not OF_EACH_KIND: to compile every one for all of them takes long."""


Rows = NDArray[np.float32]


def quantised(x: Rows) -> NDArray[np.uint8]:
    """Rows of blocks, [tokens, blocks, 48]."""
    blocks = np.full((len(x), -(-x.shape[1] // BLOCK), BLOCK_BYTES), 0xFF, np.uint8)
    for row, found in zip(x, blocks, strict=True):
        quantise_row(row.ctypes.data, len(row), found.ctypes.data)
    return blocks


def parts(blocks: NDArray[np.uint8]) -> tuple[NDArray[np.int8], Rows, NDArray[np.int32]]:
    """Codes [tokens, blocks, 32], scales [tokens, blocks] and sums [tokens, blocks, 2]."""
    words = blocks.view(np.int32)
    return blocks[..., :32].view(np.int8), words[..., 8].view(np.float32), words[..., 9:11]


def multiply(packed: Packed, x: Rows, way: Way) -> Rows:
    """What the tasks of a linear module do, in a way of our choice."""
    rows, columns = packed.shape
    geometry = packed_geometry(packed.codec, (rows, columns))
    matrix, blocks = np.array(geometry, np.int64), quantised(x)
    out = np.full((len(x), rows), np.nan, np.float32)
    job = np.array(
        [
            *(int8_tasks.tile_function(geometry, way), matrix.ctypes.data),
            *(packed.data.data_ptr(), len(x), blocks.ctypes.data, out.ctypes.data, 1),
        ],
        np.int64,
    )
    workers(1).run(int8_tasks.linear().address, job.ctypes.data, -(-rows // 32))
    return out


def multiply_many(packed: Packed, x: Rows, way: Way, each: int = 1) -> Rows:
    """The same by panels, `each` tiles at a time."""
    rows, columns = packed.shape
    geometry = packed_geometry(packed.codec, (rows, columns))
    matrix, out = np.array(geometry, np.int64), np.full((len(x), rows), np.nan, np.float32)
    panels = np.full(panel_bytes(columns) * -(-len(x) // PANEL), 0xFF, np.uint8)
    job = np.array(
        [
            *(int8_tasks.panel_function(geometry, way), matrix.ctypes.data),
            *(packed.data.data_ptr(), len(x), panels.ctypes.data, out.ctypes.data, each),
            x.ctypes.data,
        ],
        np.int64,
    )
    quantise, linear = int8_many.linear()
    workers(1).run(quantise.address, job.ctypes.data, -(-len(x) // int8_many.SLICE))
    workers(1).run(linear.address, job.ctypes.data, -(-rows // (32 * each)))
    return out


def random_matrix(name: str, rows: int, columns: int, seed: int, *, largest: bool) -> Packed:
    """A random one; with `largest` its codes are the largest that there are."""
    codec = find_codec(name)
    fields = random_fields(codec, rows, columns, seed)
    if largest:
        codes = fields.codes.fill_((1 << codec.bits) - 1)
        fields = Fields(codes, *fields[1:])
    return Packed.over(pack(codec, fields), codec, (rows, columns))


def random_rows(tokens: int, columns: int, seed: int) -> Rows:
    """Rows whose scales differ from block to block."""
    random = np.random.default_rng(seed)
    scales = np.exp(random.uniform(-4, 4, (tokens, -(-columns // BLOCK))))
    x = random.standard_normal((tokens, columns)) * np.repeat(scales, BLOCK, 1)[:, :columns]
    return x.astype(np.float32)


def test_there_are_kernels_for_all_but_fractions_of_eight_bits() -> None:
    missing = set(NAMES) - set(CODECS)
    assert missing == {"fp8_g128_f32", "fp8_row_f32"}


@pytest.mark.parametrize("name", OF_EACH_KIND)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([2, 31, 32, 45, 96]),
    columns=st.sampled_from([32, 80, 96, 256, 344, 384, 518]),
    tokens=st.integers(1, FEW_TOKENS),
    seed=st.integers(0, 1000),
    largest=st.booleans(),
)
def test_every_way_gives_the_bits_of_the_plain_one(
    name: str, rows: int, columns: int, tokens: int, seed: int, largest: bool
) -> None:
    packed = random_matrix(name, rows, columns, seed, largest=largest)
    x = random_rows(tokens, columns, seed)
    if largest:
        x = np.sign(x)  # codes of activations are ±127
    wanted = multiply(packed, x, PLAIN)
    assert np.isfinite(wanted).all()
    for way in FAST:
        assert np.array_equal(multiply(packed, x, way), wanted), way


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([2, 31, 32, 45, 96]),
    columns=st.sampled_from([32, 80, 96, 256, 344, 384, 518]),
    tokens=st.integers(1, PANEL + 10),
    seed=st.integers(0, 1000),
    largest=st.booleans(),
)
def test_panels_give_the_bits_of_few_tokens(
    name: str, rows: int, columns: int, tokens: int, seed: int, largest: bool
) -> None:
    packed = random_matrix(name, rows, columns, seed, largest=largest)
    x = random_rows(tokens, columns, seed)
    if largest:
        x = np.sign(x)
    wanted = multiply(packed, x, BEST)
    for way in OF_PANELS if name in OF_EACH_KIND else OF_PANELS[:1]:
        assert np.array_equal(multiply_many(packed, x, way, 1 + seed % 2), wanted), way


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 512), (45, 96), (33, 300)])
def test_products_are_those_of_the_quantised_activations(
    name: str, rows: int, columns: int
) -> None:
    """Up to the rounding of fp32; and those of the activations up to half a step of each."""
    packed, x = random_matrix(name, rows, columns, 1, largest=False), random_rows(8, columns, 2)
    found = multiply(packed, x, BEST).astype(np.float64)
    codes, scales, _ = parts(quantised(x))
    taken = (codes * scales[..., None].astype(np.float64)).reshape(len(x), -1)[:, :columns]
    weights = packed.dense().double().numpy()
    # a minimum is taken off sums that may be larger than their difference
    number_sums = np.abs(taken) @ (np.abs(weights) + np.abs(weights).max(1, keepdims=True)).T
    assert (np.abs(found - taken @ weights.T) <= 2e-6 * number_sums).all()
    steps = np.repeat(scales, BLOCK, axis=1)[:, :columns].astype(np.float64)
    bound = 0.5001 * steps @ np.abs(weights).T + 2e-6 * number_sums
    assert (np.abs(found - x.astype(np.float64) @ weights.T) <= bound).all()


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32
    )
)
def test_a_block_is_the_nearest_of_its_scale(values: list[float]) -> None:
    x = np.array([values], np.float32)
    codes, scales, sums = (part[0, 0] for part in parts(quantised(x)))
    scale, exact = float(scales), x[0].astype(np.float64)
    assert np.abs(codes.astype(int)).max() <= 127
    assert sums.tolist() == [codes[:16].sum(dtype=int), codes[16:].sum(dtype=int)]
    tiny = 2.0**-149 * 127  # a subnormal scale has few bits
    assert abs(scale - np.abs(exact).max() / 127) <= scale * 2**-23 + 2.0**-149
    assert (np.abs(codes * scale - exact) <= 0.50002 * scale + tiny).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_products_nan(value: float) -> None:
    x = random_rows(2, 64, 1)
    x[0, 40] = value
    packed = random_matrix("q4_k", 64, 64, 1, largest=False)
    found = [multiply(packed, x, way) for way in (*FAST, PLAIN)]
    found += [multiply_many(packed, x, way) for way in OF_PANELS]
    for spoilt, sound in found:
        assert np.isnan(spoilt).all() and np.isfinite(sound).all()


@pytest.mark.parametrize("name", ["q4_k", "q8_0", "mxfp4"])
def test_a_row_depends_on_neither_threads_nor_other_rows(name: str) -> None:
    packed = random_matrix(name, 300, 256, 1, largest=False)
    x = torch.from_numpy(random_rows(12, 256, 3))
    alone = torch.cat([Int8Linear(1)(row[None], packed) for row in x])
    for threads in (1, 2):
        linear = Int8Linear(threads)
        for tokens in range(1, len(x) + 1):
            assert torch.equal(linear(x[:tokens], packed), alone[:tokens])


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 100), max_size=6), threads=st.integers(1, 2))
def test_a_row_depends_on_no_split(cuts: list[int], threads: int) -> None:
    packed, x = random_matrix("q5_k", 77, 344, 1, largest=False), random_rows(100, 344, 3)
    rows, linear = torch.from_numpy(x), Int8Linear(threads)
    parts = [part for part in torch.tensor_split(rows, sorted(cuts)) if len(part)]
    found = torch.cat([linear(part, packed) for part in parts])
    assert torch.equal(found, linear(rows, packed))


def test_what_it_does_not_take() -> None:
    linear = Int8Linear(1)
    assert linear.takes(random_matrix("q4_k", 32, 256, 1, largest=False))
    assert not linear.takes(random_matrix("fp8_row_f32", 32, 256, 1, largest=False))
    with pytest.raises(ValueError, match="no int8 kernel for numbers of eight bits"):
        int8_tasks.tile_function(packed_geometry(find_codec("fp8_row_f32"), (32, 64)))


@njit
def gate_all(gates, ups, by_turns, kind, alpha, limit, target, blocks):  # type: ignore[no-untyped-def]
    for i in range(blocks):
        at_gates, at_ups = gates + 128 * i, ups + 128 * i
        if by_turns:
            at_gates, at_ups = gates + 256 * i, gates + 256 * i + 128
        gated_block(at_gates, at_ups, by_turns, kind, alpha, limit, target + 128 * i)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("kind", GATES[1:])
def test_gates_are_those_of_torch(kind: str, turns: bool) -> None:
    gate = Gate(kind, turns, *((1.702, 7.0) if kind == "gpt_oss" else ()))
    random = np.random.default_rng(1)
    both = np.concatenate([random.normal(0, s, 4096) for s in (0.1, 1, 10, 200)])
    both[:6] = 0.0, -0.0, 88.0, -88.0, 1e30, np.nan
    both = both.astype(np.float32)
    gates, ups = np.split(both, 2)
    out = np.zeros(len(gates), np.float32)
    given_ = gate.alpha, gate.limit
    gate_all(
        *(both.ctypes.data, ups.ctypes.data, turns, GATES.index(kind)),
        *(np.float32(given_[0]), np.float32(given_[1]), out.ctypes.data, len(out) // 32),
    )
    wanted = apply_gate(gate, torch.from_numpy(both).double()).numpy()
    assert np.array_equal(np.isnan(out), np.isnan(wanted))
    first, second = (both[0::2], both[1::2]) if turns else (gates, ups)
    slack = 1e-6 * (1 + np.abs(first, dtype=np.float64)) * (1 + np.abs(second, dtype=np.float64))
    assert ((np.abs(out - wanted) <= slack) | np.isnan(wanted)).all()


class Refusing:
    """A C library whose system grants nothing."""

    def __init__(self, name: None, use_errno: bool) -> None:
        pass

    def syscall(self, *numbers: int) -> int:
        return -1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is Intel's")
def test_tile_registers_that_are_refused_are_not_used_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_amx = dict.fromkeys(("amx-int8", "amx-tile", "avx512bw", "avx512vl", "avx512vnni"), True)
    monkeypatch.setattr(int8_tasks.binding, "get_host_cpu_features", lambda: has_amx)
    monkeypatch.setattr(int8_amx.ctypes, "CDLL", Refusing)
    monkeypatch.setattr(int8_amx, "granted", int8_amx.granted.__wrapped__)  # not a kept answer
    assert "amx-int8" not in int8_tasks.host_features.__wrapped__()
    assert "AMX is not used" in caplog.text


AVX_512 = "+avx512f,+avx512bw,+avx512vl,+avx512vnni"
INSTRUCTIONS = {
    AMX: ("x86_64", f"{AVX_512},+amx-tile,+amx-int8", ("tdpbssd", "tilestored", "zmm")),
    VNNI_512: ("x86_64", AVX_512, ("vpdpbusd", "zmm")),
    VNNI: ("x86_64", "+avx2,+fma,+f16c,+avxvnni", ("vpdpbusd", "ymm")),
    AVX2: ("x86_64", "+avx2,+fma,+f16c", ("vpmaddubsw", "vpmaddwd", "ymm")),
    NEON: ("aarch64", "+neon,+fullfp16,+dotprod", ("sdot",)),
    PLAIN: ("aarch64", "+neon", ("mla",)),
}


COMPILED = [
    (way, emitter, name)
    for way in INSTRUCTIONS
    for emitter in (int8_tile, int8_panel)
    for name in (("q4_k",) if way == PLAIN else ("q4_k", "q8_0", "mxfp4", "iq4_nl"))
    if way != AMX or emitter is int8_panel
]


@pytest.mark.parametrize(("way", "emitter", "name"), COMPILED)
def test_each_way_becomes_its_instructions(way: Way, emitter: ModuleType, name: str) -> None:
    """Compiled for machines that this one is not, too."""
    machine, features, wanted = INSTRUCTIONS[way]
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module, word = ir.Module(), I64
    kind = ir.FunctionType(ir.VoidType(), [word] * 6)
    function = ir.Function(module, kind, "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    matrix, base, tile, count, inputs, out = function.args
    general = int8_tile.without_shape(packed_geometry(find_codec(name), (64, 256)))
    product = Product(builder, frozenset(), general, at(builder, base, BYTE), tile, inputs, out)
    emitter.emit(product, at(builder, matrix, I64), way, count)
    builder.ret_void()
    target = binding.Target.from_triple(f"{machine}-unknown-linux-gnu")
    made = target.create_target_machine(features=features, opt=3)
    text = made.emit_assembly(binding.parse_assembly(str(module)))
    for instruction in wanted:
        assert instruction in text
    if way == AVX2 or way == VNNI:
        assert "zmm" not in text
