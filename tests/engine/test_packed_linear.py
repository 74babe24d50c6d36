"""Products with packed matrices equal those with the numbers that they hold."""

from dataclasses import replace

import pytest
import torch
from tests.codecs import NAMES, random_packed
from torch import nn

from tierrun.engine.codecs.packed import Packed
from tierrun.engine.kernels import cpu
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.stored import store_back

SHAPES = [(64, 256), (97, 512), (1, 256), (300, 256)]


def assert_product(kernels: CpuKernels, packed: Packed, tokens: int) -> None:
    x = torch.randn(tokens, packed.shape[1], generator=torch.Generator().manual_seed(tokens))
    wanted = x.double() @ packed.dense().double().T
    got = kernels.linear(x, packed)
    assert got.shape == wanted.shape and got.dtype == torch.float32
    # relative to the size of the products, as sums may cancel
    size = (x.double().abs() @ packed.dense().double().abs().T).clamp_min(1e-30)
    assert ((got - wanted).abs() / size).max() < 1e-5
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 512])
def test_products_are_those_of_the_numbers(name: str, tokens: int) -> None:
    for rows, columns in SHAPES:
        assert_product(CpuKernels(), random_packed(name, rows, columns), tokens)


@pytest.mark.parametrize("elements", [1 << 20, 256 * 64, 100])
def test_tiles_of_any_size_give_the_same(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TILE_ELEMENTS", elements)
    for name in NAMES:
        assert_product(CpuKernels(), random_packed(name, 130, 256), 3)


def test_never_more_than_a_tile_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TILE_ELEMENTS", 256 * 32)
    sizes, expand = [], Packed.expand

    def spy(packed: Packed, first: int, last: int, *memory: torch.Tensor) -> torch.Tensor:
        sizes.append((last - first) * packed.shape[1])
        return expand(packed, first, last, *memory)

    monkeypatch.setattr(Packed, "expand", spy)
    CpuKernels().linear(torch.randn(1, 256), random_packed("q4_k", 128, 256))
    assert sizes == [256 * 32] * 4


@pytest.mark.parametrize("name", ["q4_k", "q8_0", "fp8_g128_f32"])
def test_columns_in_another_order_multiply_their_own_inputs(name: str) -> None:
    plain = random_packed(name, 40, 256)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    mixed = replace(plain, inputs=order)
    wanted = torch.empty(40, 256)
    wanted[:, order] = plain.dense()
    x = torch.randn(3, 256)
    assert torch.equal(mixed.dense(), wanted)
    assert torch.equal(mixed.rows(torch.tensor([39, 2])), wanted[[39, 2]])
    largest = (x.abs() @ wanted.abs().T).max()
    assert (CpuKernels().linear(x, mixed) - x @ wanted.T).abs().max() <= 1e-6 * largest


@pytest.mark.parametrize("name", NAMES)
def test_modules_compute_with_packed_weights(name: str) -> None:
    packed, bias = random_packed(name, 70, 256), torch.randn(70)
    linear, embedding = nn.Linear(256, 70), nn.Embedding(70, 256)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    for module in (linear, embedding):
        store_back(module, packed, CpuKernels())
    x, ids = torch.randn(2, 3, 256), torch.tensor([[0, 69], [33, 0]])
    dense = packed.dense()
    wanted, largest = nn.functional.linear(x, dense, bias), (x.abs() @ dense.abs().T).max()
    assert (linear(x) - wanted).abs().max() <= 1e-6 * largest, "of the sum of what cancels"
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, packed.dense()))
    torch.testing.assert_close(linear.weight @ x[0, 0], packed.dense() @ x[0, 0])
