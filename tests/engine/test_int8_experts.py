"""A layer's experts with int8 activations, against exact dequantisation, and in an engine."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.checkpoints import quiet
from tests.engine.conftest import PROMPT, Model
from tests.engine.test_host_experts import SILU, Floats, Layer

import tierrun
from tierrun.engine.gpu.activations import apply_gate
from tierrun.engine.kernels import int8_ready, int8_tasks
from tierrun.engine.kernels.host import HostExperts, supports_int8
from tierrun.engine.kernels.int8 import FEW_TOKENS
from tierrun.engine.kernels.int8_ready import Int8Ready
from tierrun.engine.kernels.int8_rows import PANEL
from tierrun.engine.kernels.matvec import Gate

LARGEST_ERROR = 0.03
"""Root mean square, relative: each activation is wrong by up to 1/254 of its block's largest."""


def exact(layer: Layer, x: Floats, tokens: list[int], which: list[int]) -> Floats:
    """In fp64."""
    rows = []
    for token, record in zip(tokens, which, strict=True):
        (first, down), (bias, down_bias) = layer.weights[record], layer.biases[record]
        both = torch.from_numpy(x[token]).double() @ first.T + bias
        rows.append(apply_gate(layer.gate, both) @ down.T + down_bias)
    return torch.stack(rows).numpy()


def error(found: Floats, wanted: Floats) -> float:
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


@pytest.mark.parametrize(
    ("gate", "codec", "hidden", "inner", "bias"),
    [
        (SILU, "q4_k", 256, 64, None),
        (SILU, "q4_0", 320, 80, "bf16"),
        (SILU, "q6_k", 300, 45, "f32"),
        (SILU, "nvfp4", 64, 17, "f16"),
        (Gate("silu", interleaved=True), "q8_0", 96, 45, "f16"),
        (Gate("gelu"), "q5_0", 64, 96, None),
        (Gate("gelu_tanh", interleaved=True), "int4z_g32_f16", 64, 40, None),
        (Gate("gpt_oss", interleaved=True, alpha=1.702, limit=7.0), "mxfp4", 90, 90, "bf16"),
        (Gate("gpt_oss", alpha=1.702, limit=0.5), "mxfp4", 64, 70, "f32"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_layers_of_any_shape(
    gate: Gate, codec: str, hidden: int, inner: int, bias: str | None
) -> None:
    layer = Layer(codec, hidden, inner, gate, bias)
    x, tokens, which = layer.activations(5), [0, 1, 2, 3, 4, 0, 1], [2, 2, 2, 2, 2, 0, 0]
    out = layer.compute(HostExperts(layer.layout, 1, int8=True), x, tokens, which)
    wanted = exact(layer, x, tokens, which)
    assert error(out, wanted) < LARGEST_ERROR
    in_fp32 = layer.compute(HostExperts(layer.layout, 1), x, tokens, which)
    assert not np.array_equal(out, in_fp32), "never quantised"


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=27),
    threads=st.integers(1, 2),
)
def test_a_row_depends_on_its_record_and_token_only(
    pairs: list[tuple[int, int]], threads: int
) -> None:
    layer = Layer("q4_k", 300, 45, bias="bf16")
    most = max(token for token, _ in pairs) + 1
    x, (tokens, which) = layer.activations(9)[:most], map(list, zip(*pairs, strict=True))
    out = layer.compute(HostExperts(layer.layout, threads, int8=True), x, tokens, which)
    alone = HostExperts(layer.layout, 1, int8=True)
    for row, (token, record) in zip(out, pairs, strict=True):
        assert np.array_equal(row, layer.compute(alone, x, [token], [record])[0])


@pytest.mark.parametrize("gate", [SILU, Gate("gpt_oss", True, 1.702, 7.0)], ids=["apart", "turns"])
@pytest.mark.parametrize("tokens", [9, PANEL, 2 * PANEL + 1])
def test_many_tokens_give_the_bits_of_few(gate: Gate, tokens: int) -> None:
    layer = Layer("q4_k", 300, 45, gate, bias="bf16")
    x, which = layer.activations(tokens), [2, 0] * tokens
    places = [token for token in range(tokens) for _ in range(2)]
    experts = HostExperts(layer.layout, 2, int8=True)
    found = layer.compute(experts, x, places, which)
    few = [
        layer.compute(experts, x[i : i + 1], [0, 0], which[2 * i : 2 * i + 2])
        for i in range(tokens)
    ]
    assert np.array_equal(found, np.concatenate(few))


def test_few_of_many_tokens_are_computed_as_if_alone() -> None:
    """Where experts have few tokens each, only these are quantised."""
    layer = Layer("q4_k", 300, 45, bias="bf16")
    experts, x = HostExperts(layer.layout, 2, int8=True), layer.activations(40)
    tokens, which = [39, 5, 17, 39], [0, 1, 2, 2]
    found = layer.compute(experts, x, tokens, which)
    for row, token, record in zip(found, tokens, which, strict=True):
        alone = layer.compute(experts, x[token : token + 1], [0], [record])
        assert np.array_equal(row, alone[0])
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match="no such token among 40"):
            layer.compute(experts, x, [5, wrong], [0, 1])


def test_results_go_to_the_rows_that_are_asked_for() -> None:
    layer = Layer("q8_0", 64, 32)
    experts = HostExperts(layer.layout, 1, int8=True)
    for tokens in (4, 20):
        x, order = layer.activations(tokens), np.arange(tokens)
        which, rows = np.zeros(tokens, np.int64), order[::-1] * 2
        out = np.full((2 * tokens, 64), np.nan, np.float32)
        experts.begin(layer.addresses, x, order, which, out, np.ascontiguousarray(rows))
        experts.finish()
        wanted = layer.compute(experts, x, list(order), list(which))
        assert np.array_equal(out[rows], wanted) and np.isnan(out[1::2]).all()


@pytest.mark.parametrize("codec", ["bf16", "fp8_g128_f32"])
def test_what_has_no_int8_kernel_is_computed_in_fp32(codec: str) -> None:
    layer = Layer(codec, 256, 32)
    assert not supports_int8(layer.layout)
    x = layer.activations(1)
    out = layer.compute(HostExperts(layer.layout, 1, int8=True), x, [0], [1])
    layer.check(out, x, [0], [1])


@pytest.fixture(scope="module")
def packed(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that can be in Q4_0 is."""
    store = tmp_path_factory.mktemp("int8") / "store"
    with quiet():
        tierrun.convert(model.checkpoint, store, quant="q4_0", quant_resident="q4_0")
    return store


def decoded(store: Path, tokens: int = 1, **options: object) -> torch.Tensor:
    """Logits of the prompt, `tokens` of it at a time."""
    given_ = {"ram": "1GiB", "device": "cpu", "ubatch": tokens} | options
    with tierrun.load(store, **given_) as engine:
        return engine.logits(PROMPT)


def test_the_same_bits_for_any_budget(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tierrun"):
        wanted = decoded(packed)
    assert "int8 activations for experts in 4 of 4 layers" in caplog.text
    smallest = str(64 << 10)
    assert torch.equal(decoded(packed, ram=smallest), wanted)
    assert torch.equal(decoded(packed, lookahead=False), wanted)
    assert torch.equal(decoded(packed, threads=2), wanted)


def test_a_prompt_is_computed_as_its_tokens_are(packed: Path) -> None:
    """But for torch's attention, whose last bits int8 makes larger."""
    assert len(PROMPT) > FEW_TOKENS
    wanted, found = decoded(packed), decoded(packed, tokens=len(PROMPT))
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_exact_is_fp32_whatever_the_number_of_tokens(packed: Path) -> None:
    wanted = decoded(packed, tokens=len(PROMPT), exact=True)
    near = decoded(packed, exact=True)
    torch.testing.assert_close(near, wanted, rtol=1e-3, atol=1e-3)
    rounded = decoded(packed)
    assert not torch.equal(rounded, near) and (rounded - near).norm() < 0.2 * near.norm()


SCRIPT = """
import sys, logging
from tests.engine.test_host_experts import Layer
from tierrun.engine.kernels.host import HostExperts
assert not {"numba", "llvmlite"} & set(sys.modules)
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
logging.getLogger("numba").setLevel(logging.ERROR)
HostExperts(Layer("q8_0", 64, 32).layout, 1, int8=True)
HostExperts(Layer("q8_0", 96, 64).layout, 1, int8=True)
"""


def test_one_kernel_for_all_shapes_of_a_codec_and_kept(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root / 'src'}:{root}",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }

    def said() -> str:
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=environment, check=True, text=True, capture_output=True)
        return done.stderr

    assert said().count("compiled a CPU kernel") == 2  # for few tokens and for many
    assert "compiled" not in said()


def test_waiting_for_the_compiler_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_ready, "PATIENCE", 0.05)
    monkeypatch.setattr(int8_tasks, "tile_function", lambda geometry: time.sleep(0.3))
    Int8Ready(["q4_0", "bf16", "something"]).wait()
    said = "compiling the CPU's kernels, once for this version and machine: "
    assert f"{said}0 of 5" in caplog.text


def test_what_stops_the_compiler_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(geometry: object) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(int8_tasks, "tile_function", fail)
    with pytest.raises(OSError, match="no space left"):
        Int8Ready(["q4_0"]).wait()
    Int8Ready(["bf16", "fp8_row_f32"]).wait()  # nothing to compile
