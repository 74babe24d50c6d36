"""Experts on the CPU from their packed records, against exact dequantisation."""

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
from numpy.typing import NDArray
from tests.codecs import NAMES, random_matrix

from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.gpu.activations import apply_gate
from tierrun.engine.gpu.layout import ExpertLayout
from tierrun.engine.kernels import host
from tierrun.engine.kernels.geometry import Geometry
from tierrun.engine.kernels.host import HostExperts, supported
from tierrun.engine.kernels.matmul import Operand
from tierrun.engine.kernels.matvec import Bias, Gate
from tierrun.io.extent import align_up

CODECS = (*NAMES, "int4z_g128_f16", *DTYPES)
SILU = Gate("silu")
TOLERANCE = 1e-5
"""Of the sum of the products' magnitudes."""

Floats = NDArray[np.float32]


class Layer:
    """Three random records of a layer in `codec`, with biases in the dtype `bias` if any."""

    def __init__(
        self, codec: str, hidden: int, inner: int, gate: Gate = SILU, bias: str | None = None
    ) -> None:
        self.gate, self.records = gate, []
        self.weights: list[list[torch.Tensor]] = []
        self.biases: list[list[torch.Tensor]] = []
        shapes = ((2 * inner, hidden), (hidden, inner))
        for record in range(3):
            parts = [random_matrix(codec, s, 2 * record + i) for i, s in enumerate(shapes)]
            random = torch.Generator().manual_seed(record)
            biases = [torch.randn(s[0], generator=random) for s in shapes]
            biases = [b.to(DTYPES[bias]) if bias else torch.zeros(len(b)) for b in biases]
            self.weights.append([matrix for _, _, matrix in parts])
            self.biases.append([values.double() for values in biases])
            first, down = self._put(parts, biases, bias)
        self.layout = ExpertLayout((first,), down, gate)

    def _put(
        self,
        parts: list[tuple[Geometry, torch.Tensor, torch.Tensor]],
        biases: list[torch.Tensor],
        bias: str | None,
    ) -> list[Operand]:
        """Add a record, ending with its last byte; the operands in it."""
        pieces, operands, end = [], [], 64
        for (geometry, data, _), values in zip(parts, biases, strict=True):
            at, at_bias = end, align_up(end + len(data), 64)
            end = align_up(at_bias + (values.nbytes if bias else 0), 64)
            pieces += [(at, data)] + ([(at_bias, values.view(torch.uint8))] if bias else [])
            described = Bias(at_bias, values.dtype) if bias else None
            operands.append(Operand(geometry, at, described))
        memory = torch.zeros(end + 64, dtype=torch.uint8)
        record = memory[-memory.data_ptr() % 64 :][:end]
        for at, data in pieces:
            record[at : at + len(data)] = data
        self.records.append(record)
        return operands

    @property
    def hidden(self) -> int:
        return len(self.biases[0][1])

    def activations(self, tokens: int) -> Floats:
        random = torch.Generator().manual_seed(tokens)
        values: Floats = (0.1 * torch.randn(tokens, self.hidden, generator=random)).numpy()
        return values

    @property
    def addresses(self) -> np.ndarray:
        return np.array([record.data_ptr() for record in self.records], np.int64)

    def compute(
        self, experts: HostExperts, x: Floats, tokens: list[int], which: list[int]
    ) -> Floats:
        out = np.full((len(which), self.hidden), np.nan, np.float32)
        experts.compute(self.records, x, np.array(tokens, np.int64), np.array(which, np.int64), out)
        return out

    def check(self, out: Floats, x: Floats, tokens: list[int], which: list[int]) -> None:
        """`out` is right up to the rounding of fp32 sums."""
        for found, token, record in zip(out, tokens, which, strict=True):
            (first, down), (bias, down_bias) = self.weights[record], self.biases[record]
            row = torch.from_numpy(x[token]).double()
            both = row @ first.T + bias
            h = apply_gate(self.gate, both)
            error = (torch.from_numpy(found).double() - (h @ down.T + down_bias)).abs()
            # an activation's derivative is at most about one in each of gate and up
            slack = (row.abs() @ first.abs().T) * (1 + both.abs().max())
            slack = slack.max() + h.abs()
            assert (error <= TOLERANCE * (slack @ down.abs().T + down_bias.abs())).all()


@pytest.fixture(scope="module")
def small() -> tuple[Layer, HostExperts]:
    """A layer with biases and narrow last tiles everywhere."""
    layer = Layer("q4_k", 300, 45, bias="bf16")
    return layer, HostExperts(layer.layout, 2)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec(codec: str) -> None:
    layer = Layer(codec, 288, 32)
    x, tokens, which = layer.activations(3), [0, 1, 2, 0, 1], [2, 2, 2, 0, 0]
    out = layer.compute(HostExperts(layer.layout, 1), x, tokens, which)
    layer.check(out, x, tokens, which)


@pytest.mark.parametrize("codec", ["q6_k", "mxfp4", "fp8_row_f32", "bf16"])
def test_narrow_tiles_and_parts_of_spans(codec: str) -> None:
    layer = Layer(codec, 90, 17, bias="f16")
    x, tokens, which = layer.activations(4), [3, 2, 1, 0], [1, 1, 1, 1]
    out = layer.compute(HostExperts(layer.layout, 1), x, tokens, which)
    layer.check(out, x, tokens, which)


@pytest.mark.parametrize(
    "gate",
    [
        SILU,
        Gate("silu", interleaved=True),
        Gate("gelu"),
        Gate("gelu_tanh"),
        Gate("gpt_oss", interleaved=True, alpha=1.702, limit=7.0),
        Gate("gpt_oss", alpha=1.702, limit=0.5),
    ],
    ids=lambda gate: f"{gate.kind}-{gate.interleaved}",
)
@pytest.mark.parametrize(("codec", "inner"), [("q8_0", 64), ("bf16", 45)])
def test_gates(gate: Gate, codec: str, inner: int) -> None:
    layer = Layer(codec, 64, inner, gate, "f32")
    x, tokens, which = layer.activations(2), [0, 1, 1], [0, 0, 2]
    out = layer.compute(HostExperts(layer.layout, 1), x, tokens, which)
    layer.check(out, x, tokens, which)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_row_depends_on_its_record_and_token_only(
    small: tuple[Layer, HostExperts], data: st.DataObject
) -> None:
    """Up to 8 tokens in any batches, by any number of threads: the same bits."""
    layer, experts = small
    x = layer.activations(8)
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2)), min_size=1, max_size=24)
    )
    tokens, which = map(list, zip(*pairs, strict=True))
    out = layer.compute(experts, x, tokens, which)
    layer.check(out, x, tokens, which)
    alone = HostExperts(layer.layout, 1)
    for row, (token, record) in zip(out, pairs, strict=True):
        assert np.array_equal(row, layer.compute(alone, x, [token], [record])[0])


@pytest.mark.parametrize("codec", ["q4_k", "bf16"])
def test_threads_change_nothing(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than cores, too, and again and again: who computes what differs."""
    monkeypatch.setattr(host, "_cores", lambda: 5)
    layer = Layer(codec, 256, 64)
    x, tokens, which = layer.activations(2), [0, 1, 0, 1], [0, 0, 1, 2]
    wanted = layer.compute(HostExperts(layer.layout, 1), x, tokens, which)
    for threads in (2, 5):
        experts = HostExperts(layer.layout, threads)
        for _ in range(200):
            assert np.array_equal(layer.compute(experts, x, tokens, which), wanted)


def test_others_compute_while_the_caller_does_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "_cores", lambda: 3)
    layer = Layer("q4_k", 256, 64)
    experts, x = HostExperts(layer.layout, 3), layer.activations(2)
    tokens, which = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 2])
    wanted = layer.compute(experts, x, tokens.tolist(), which.tolist())
    left = set()
    for number in range(60):
        out = np.full_like(wanted, np.nan)
        experts.begin(layer.addresses, x, tokens, which, out)
        time.sleep(0.02 if number % 2 else 0)
        left.add(experts.finish())
        assert np.array_equal(out, wanted)
    assert False in left, "the others never did all of it"


def test_the_caller_does_alone_what_nobody_else_does(
    small: tuple[Layer, HostExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_cores", lambda: 1)
    layer, _ = small
    experts, x = HostExperts(layer.layout, 1), layer.activations(1)
    out = np.full((1, 300), np.nan, np.float32)
    experts.begin(layer.addresses, x, np.array([0]), np.array([1]), out)
    assert np.isnan(out).all() and experts.finish()
    layer.check(out, x, [0], [1])


def test_nothing_to_compute(small: tuple[Layer, HostExperts]) -> None:
    layer, experts = small
    assert layer.compute(experts, layer.activations(1), [], []).shape == (0, 300)


def test_assignments_of_nothing_are_refused(small: tuple[Layer, HostExperts]) -> None:
    layer, experts = small
    for token, record in ((0, 3), (0, -1), (1, 0), (-1, 0)):
        with pytest.raises(IndexError, match="no such record among 3, or token among 1"):
            layer.compute(experts, layer.activations(1), [token], [record])


def test_what_is_not_supported_is_said() -> None:
    layer = Layer("q8_0", 32, 32)
    assert supported(layer.layout) is None
    (first,), down = layer.layout.first, layer.layout.down
    apart = ExpertLayout((first, first), down, SILU)
    assert supported(apart) == "gate and up are in different codecs"
    own = ExpertLayout((first,), down, Gate("none"))
    with pytest.raises(ValueError, match="an activation of its own"):
        HostExperts(own, 1)


SCRIPT = """
import sys, logging
from tests.engine.test_host_experts import Layer
from tierrun.engine.kernels.host import HostExperts
assert not {"numba", "llvmlite"} & set(sys.modules)
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
logging.getLogger("numba").setLevel(logging.ERROR)
HostExperts(Layer("q8_0", 64, 32).layout, 1)
"""


def test_compiled_code_is_kept_between_processes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": f"{root / 'src'}:{root}",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }

    def said() -> str:
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=environment, check=True, text=True, capture_output=True)
        return done.stderr

    assert "compiled the CPU's kernels" in said()
    assert "compiled" not in said()


def test_compiling_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A second object for a layout compiles nothing and says nothing."""
    layer = Layer("q8_0", 32, 32)
    HostExperts(layer.layout, 1)
    with caplog.at_level(logging.INFO, "tierrun"):
        HostExperts(layer.layout, 1)
    assert not caplog.records
