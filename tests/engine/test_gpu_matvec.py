"""The decode kernels against exact dequantisation: on a GPU, or interpreted where there is none."""

from functools import partial

import pytest
import torch
from tests.codecs import NAMES, random_matrix

from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.gpu.activations import apply_gate
from tierrun.engine.kernels import matvec
from tierrun.engine.kernels.matvec import Bias, Config, Gate
from tierrun.engine.kernels.rows import rows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CONFIG = None if CUDA else Config(32, 4, 64)
"""Interpreted, few programs: each costs milliseconds."""
CODECS = (*NAMES, "int4z_g128_f16", *DTYPES)
TOLERANCE = 1e-5
"""Of the sum of the products' magnitudes."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def assert_product(y: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> None:
    """`y` is `x` times `matrix`, both in fp64, up to the rounding of fp32 sums."""
    error = (y.cpu().double() - x.double() @ matrix.T).abs()
    assert (error <= TOLERANCE * (x.double().abs() @ matrix.abs().T)).all()


class Slab:
    """Three records of random matrices of one shape, after one another, with a bias each."""

    def __init__(self, codec: str, shape: tuple[int, int], bias: str = "bf16") -> None:
        parts = [random_matrix(codec, shape, seed) for seed in range(3)]
        self.geometry, data, _ = parts[0]
        self.matrices = [matrix for _, _, matrix in parts]
        self.offset = 128
        self.bias = Bias(-(-(self.offset + len(data)) // 64) * 64, DTYPES[bias])
        self.biases = [torch.randn(shape[0]).to(DTYPES[bias]) for _ in parts]
        record = -(-(self.bias.offset + 4 * shape[0]) // 4096) * 4096
        self.slots = [0, record, 2 * record]
        slab = torch.zeros(3 * record, dtype=torch.uint8)
        for slot, (_, data, _), values in zip(self.slots, parts, self.biases, strict=True):
            slab[slot + self.offset :][: len(data)] = data
            there = values.view(torch.uint8)
            slab[slot + self.bias.offset :][: len(there)] = there
        self.data = slab.to(DEVICE)


def on_device(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("shape", "tokens"), [((32, 288), 1), ((33, 300), 2)])
def test_linear(codec: str, shape: tuple[int, int], tokens: int) -> None:
    geometry, data, matrix = random_matrix(codec, shape)
    x, bias = torch.randn(tokens, shape[1]), torch.randn(shape[0])
    y = matvec.linear(x.to(DEVICE), data.to(DEVICE), geometry, config=CONFIG)
    assert_product(y, x, matrix)
    z = matvec.linear(x.to(DEVICE), data.to(DEVICE), geometry, bias.to(DEVICE), config=CONFIG)
    torch.testing.assert_close(z.cpu(), y.cpu() + bias)


@pytest.mark.parametrize("config", [Config(32, 1, 32), Config(8, 8, 64), Config(16, 2, 16)])
@pytest.mark.parametrize("codec", ["q4_k", "q6_k", "bf16"])
def test_every_way_of_cutting_up_gives_the_product(codec: str, config: Config) -> None:
    geometry, data, matrix = random_matrix(codec, (40, 672))
    x = torch.randn(1, 672)
    assert_product(matvec.linear(x.to(DEVICE), data.to(DEVICE), geometry, config=config), x, matrix)


@pytest.mark.parametrize("codec", ["q4_k", "bf16"])
def test_more_tokens_change_nothing(codec: str) -> None:
    geometry, data, _ = random_matrix(codec, (16, 288))
    x, data = torch.randn(8, 288).to(DEVICE), data.to(DEVICE)
    together = matvec.linear(x, data, geometry, config=CONFIG)
    for token in (0, 5, 7):
        alone = matvec.linear(x[token : token + 1], data, geometry, config=CONFIG)
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("codec", ["q4_k", "q8_0", "mxfp4", "fp8_g128_f32", "bf16", "f16"])
def test_grouped_takes_each_assignment_from_its_slot(codec: str) -> None:
    slab = Slab(codec, (32, 160))
    x, experts = torch.randn(2, 160), [2, 0, 1, 2]
    slots = on_device([slab.slots[expert] for expert in experts])
    where = slab.geometry, slab.offset
    y = matvec.grouped(x.to(DEVICE), slab.data, slots, 2, *where, config=CONFIG)
    for assignment, expert in enumerate(experts):
        token = assignment // 2
        assert_product(y[assignment : assignment + 1], x[token : token + 1], slab.matrices[expert])


@pytest.mark.parametrize("codec", ["q4_k", "bf16"])
def test_results_do_not_depend_on_the_launch(codec: str) -> None:
    """What is missing at first and computed later is the same to the bit, in whatever slot."""
    slab = Slab(codec, (32, 160))
    h, order = torch.randn(3, 160).to(DEVICE), [1, 2, 0]
    moved = torch.cat([slab.data, slab.data])
    down = partial(
        matvec.down, geometry=slab.geometry, offset=slab.offset, bias=slab.bias, config=CONFIG
    )
    whole = on_device([slab.slots[expert] for expert in order])
    wanted = down(h, slab.data, whole)
    found = torch.full_like(wanted, torch.nan)
    some = on_device([slab.slots[1], -1, -1])
    down(h, slab.data, some, out=found)
    assert found[1:].isnan().all()
    rest = on_device([-1, *(len(slab.data) + slab.slots[expert] for expert in order[1:])])
    down(h, moved, rest, out=found)
    assert torch.equal(found, wanted)


GATED = [
    Gate("silu"),
    Gate("silu", interleaved=True),
    Gate("gelu"),
    Gate("gelu_tanh"),
    Gate("gpt_oss", interleaved=True, alpha=1.702, limit=7.0),
    Gate("gpt_oss", alpha=1.702, limit=7.0),
]


@pytest.mark.parametrize("gate", GATED, ids=lambda gate: f"{gate.kind}-{gate.interleaved}")
@pytest.mark.parametrize(
    ("codec", "shape"), [("q4_k", (64, 128)), ("bf16", (48, 96)), ("mxfp4", (48, 96))]
)
@pytest.mark.parametrize("biased", [True, False])
def test_gate_up(gate: Gate, codec: str, shape: tuple[int, int], biased: bool) -> None:
    slab = Slab(codec, shape, "f32" if codec == "mxfp4" else "bf16")
    x, experts = 0.1 * torch.randn(1, shape[1]), [1, 0]
    slots = on_device([slab.slots[expert] for expert in experts])
    bias = slab.bias if biased else None
    where = slab.geometry, slab.offset
    h = matvec.gate_up(x.to(DEVICE), slab.data, slots, 2, *where, gate, bias, config=CONFIG)
    both = torch.cat([x.double() @ slab.matrices[expert].T for expert in experts])
    if biased:
        both += torch.stack([slab.biases[expert].double() for expert in experts])
    wanted = apply_gate(gate, both)
    torch.testing.assert_close(h.cpu().double(), wanted, rtol=1e-5, atol=1e-3)


def test_the_gate_none_leaves_both_halves() -> None:
    slab = Slab("q8_0", (64, 64))
    x = torch.randn(1, 64)
    slots = on_device([slab.slots[1]])
    both = matvec.gate_up(
        x.to(DEVICE), slab.data, slots, 1, slab.geometry, slab.offset, Gate("none")
    )
    assert_product(both, x, slab.matrices[1])


def test_weighted_sum() -> None:
    y, weights = torch.randn(2, 3, 300), torch.rand(2, 3)
    found = matvec.weighted_sum(y.to(DEVICE), weights.to(DEVICE)).cpu()
    torch.testing.assert_close(found, (y * weights[..., None]).sum(dim=1))


@pytest.mark.parametrize("codec", CODECS)
def test_rows(codec: str) -> None:
    geometry, data, matrix = random_matrix(codec, (72, 300))
    ids = torch.tensor([71, 33, 33])
    found = rows(ids.to(DEVICE), data.to(DEVICE), geometry).cpu()
    torch.testing.assert_close(found.double(), matrix[ids], rtol=1e-6, atol=1e-6)
