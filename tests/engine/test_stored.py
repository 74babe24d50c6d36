"""Weights computed with as stored equal their widening to fp32."""

from collections.abc import Callable

import pytest
import torch
from tests.engine.conftest import PROMPT, Model
from torch import nn

import tierrun
from tierrun.engine.kernels import cpu
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.stored import StoredEmbedding, StoredLinear, can_store, store_back
from tierrun.io.errors import ModelError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    store_back(module, weight, CpuKernels())
    return module


@pytest.fixture(params=[cpu.TILE_ELEMENTS, 100, 7], ids=["one tile", "some tiles", "row by row"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch larger than the matrix, smaller than it, and smaller than one of its rows."""
    monkeypatch.setattr(cpu, "TILE_ELEMENTS", request.param)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9,), (1, 9), (4, 9), (2, 3, 9)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_stored_linear_equals_its_widening(
    dtype: torch.dtype, shape: tuple[int, ...], biased: bool
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(23, 9).to(dtype), torch.randn(shape)
    bias = torch.randn(23) if biased else None
    wanted = nn.functional.linear(x, weight.float(), bias)
    got = stored_linear(weight, bias)(x)
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_product_depends_on_values_and_not_on_where_they_lie(
    dtype: torch.dtype, rows: int
) -> None:
    torch.manual_seed(0)
    kernels, weight, x = CpuKernels(), torch.randn(64, 96).to(dtype), torch.randn(rows, 96)
    elsewhere = torch.empty(64 * 96 + 4096, dtype=dtype)[4096:].view(64, 96).copy_(weight)
    assert torch.equal(kernels.linear(x, weight), kernels.linear(x, elsewhere))
    kernels.linear(torch.randn(3, 7), torch.randn(5, 7).to(dtype))
    assert torch.equal(kernels.linear(x, weight), CpuKernels().linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stored_embedding_is_the_widened_row(dtype: torch.dtype) -> None:
    weight, ids = torch.randn(11, 6).to(dtype), torch.tensor([[0, 3], [10, 3]])
    module = nn.Embedding(11, 6)
    store_back(module, weight, CpuKernels())
    assert type(module) is StoredEmbedding
    assert torch.equal(module(ids), weight.float()[ids])


class Scaled(nn.Embedding):
    """As Gemma's: scales what torch's own embedding gives."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        return super().forward(input) * 4.0


class Tapped(nn.Linear):
    """Passes its input on before it multiplies."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        return super().forward(input.relu())


class Own(nn.Linear):
    """A forward of its own, which reads the weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        return input @ self.weight.T


def test_a_module_keeps_what_its_class_adds() -> None:
    weight = torch.randn(11, 6).to(torch.bfloat16)
    module = Scaled(11, 6)
    assert can_store(module)
    store_back(module, weight, CpuKernels())
    assert isinstance(module, Scaled) and isinstance(module, StoredEmbedding)
    assert torch.equal(module(torch.tensor([2])), weight[2:3].float() * 4)
    linear = Tapped(6, 11)
    store_back(linear, weight, CpuKernels())
    assert isinstance(linear, Tapped) and isinstance(linear, StoredLinear)
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0, -1.0, 5.0]])
    torch.testing.assert_close(
        linear(x), nn.functional.linear(x.relu(), weight.float(), linear.bias)
    )


@pytest.mark.parametrize(
    ("module", "good"),
    [
        (nn.Linear(2, 2), True),
        (nn.Embedding(2, 2), True),
        (Scaled(2, 2), True),
        (Tapped(2, 2), True),
        (Own(2, 2), False),
        (nn.LayerNorm(2), False),
        (nn.Conv1d(2, 2, 1), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_modules_that_leave_the_weight_to_torch_are_stored(
    module: nn.Module, good: bool
) -> None:
    assert can_store(module) is good


def test_the_placeholder_takes_no_memory() -> None:
    module = stored_linear(torch.randn(23, 9))
    assert module.weight.shape == (23, 9) and module.weight.dtype == torch.float32
    assert isinstance(module.weight, nn.Parameter)
    with torch._C.DisableTorchFunctionSubclass():
        assert module.weight.untyped_storage().nbytes() == 4


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w @ torch.ones(9, 2),
        lambda w: torch.ones(2, 23) @ w,
        lambda w: w.T,
        lambda w: w.t().contiguous(),
        lambda w: w.data + 0,
        lambda w: w.detach() * 2,
        lambda w: w[3:5],
        lambda w: nn.functional.linear(torch.ones(2, 9), w),
        lambda w: w.to(torch.float64),
    ],
)
def test_code_that_reads_a_stored_weight_itself_gets_its_values(
    read: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    weight = torch.randn(23, 9).to(torch.bfloat16)
    assert torch.equal(read(stored_linear(weight).weight), read(weight.float()))


def test_logits_with_nan_are_refused(model: Model) -> None:
    with tierrun.load(model.store, ram="1GiB") as engine:
        head = engine.model.get_output_embeddings()
        head.forward = lambda x: x * float("nan")
        with pytest.raises(ModelError, match="qwen3_moe gave NaN"):
            engine.logits(PROMPT)
