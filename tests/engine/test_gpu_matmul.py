"""Products for many tokens are those of operands rounded to fp16; interpreted or compiled."""

from functools import partial

import pytest
import torch
from tests.codecs import NAMES, random_fields

from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import pack
from tierrun.engine.kernels import geometry, matmul
from tierrun.engine.kernels.geometry import Geometry
from tierrun.engine.kernels.matmul import Grouping, Operand
from tierrun.engine.kernels.matvec import Bias, Gate
from tierrun.engine.kernels.tiles import GROWTH as _GROWTH
from tierrun.io.extent import align_up

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, TOP_K = 6, 2
GROWTH: float = _GROWTH.value
GATES = {
    "silu": Gate("silu"),
    "gelu_tanh": Gate("gelu_tanh"),
    "gelu": Gate("gelu"),
    "gpt_oss": Gate("gpt_oss", interleaved=True, alpha=1.5, limit=2.0),
}


def matrix(
    name: str, rows: int, columns: int, seed: int
) -> tuple[torch.Tensor, Geometry, torch.Tensor]:
    """The bytes of a random matrix, what they are, and its numbers rounded to fp16 (fp64)."""
    if name in DTYPES:
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        values = values.to(DTYPES[name])
        data = values.flatten().view(torch.uint8)
        described = geometry.dense_geometry(name, (rows, columns))
        return data, described, values.to(torch.float16).double()
    codec = find_codec(name)
    data = pack(codec, random_fields(codec, rows, columns, seed))
    numbers = Packed.over(data, codec, (rows, columns)).dense()
    described = geometry.packed_geometry(codec, (rows, columns))
    return data, described, numbers.to(torch.float16).double()


def assert_product(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """`got` is `x` times `w` transposed, relative to the size of the products: sums may cancel."""
    wanted, size = x @ w.T, x.abs() @ w.abs().T
    assert got.shape == wanted.shape
    error = (got.cpu().double() - wanted).abs()
    # a weight that lies between two of fp16 may be rounded to the other one by a fused multiply-add
    assert (error <= 5e-5 * size).all()
    assert error.norm() <= 5e-5 * wanted.norm()


def operand(x: torch.Tensor) -> torch.Tensor:
    return (x.float() / GROWTH).to(torch.float16).double() * GROWTH


@pytest.mark.parametrize("name", [*NAMES, *DTYPES, "int4_g96_bf16", "int8z_row_f16"])
@pytest.mark.parametrize("shape", [(41, 296), (64, 256)])
def test_linear_is_the_product_of_the_numbers(name: str, shape: tuple[int, int]) -> None:
    data, described, w = matrix(name, *shape, seed=1)
    x = torch.randn(19, shape[1], generator=torch.Generator().manual_seed(2))
    y = matmul.linear(x.to(DEVICE), data.to(DEVICE), described)
    assert y.dtype == torch.float32
    assert_product(y, operand(x), w)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 70, 130])
def test_any_number_of_tokens(tokens: int) -> None:
    data, described, w = matrix("q8_0", 70, 64, seed=3)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    bias = torch.randn(70)
    y = matmul.linear(x.to(DEVICE), data.to(DEVICE), described, bias.to(DEVICE))
    assert_product(y - bias.to(DEVICE), operand(x), w)


@pytest.mark.parametrize("name", ["q4_k", "q5_1", "int4_g96_bf16"])
@pytest.mark.parametrize("tokens", [1, 256, 300])
def test_programs_of_many_rows(name: str, tokens: int) -> None:
    shape = (40, 96) if name == "int4_g96_bf16" else (40, 256)
    data, described, w = matrix(name, *shape, seed=4)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
    y = matmul.linear(x.to(DEVICE), data.to(DEVICE), described, block=matmul.WIDE)
    assert_product(y, operand(x), w)


def test_rows_of_a_program_of_a_resident_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 of packed weights on Hopper, where rounds of such programs leave little idle."""
    device = torch.device("cpu")
    packed, small, dense = (
        matrix(name, rows, 32, seed=1)[1]
        for name, rows in (("q8_0", 14336), ("q8_0", 1024), ("bf16", 14336))
    )
    rows = (20, 64, 100, 256, 300, 512, 2048)
    assert [matmul.linear_block(n, packed, device) for n in rows] == [32, 64, *[128] * 5]
    monkeypatch.setattr(matmul, "_is_hopper", lambda _: True)
    monkeypatch.setattr(matmul, "_processors", lambda _: 132)
    found = [matmul.linear_block(n, packed, device) for n in rows]
    assert found == [32, 64, 128, 256, 128, 256, 256]
    assert [matmul.linear_block(2048, other, device) for other in (small, dense)] == [128, 128]


def test_no_tokens() -> None:
    data, described, _ = matrix("q4_k", 32, 256, seed=3)
    x = torch.empty(0, 256, device=DEVICE)
    assert matmul.linear(x, data.to(DEVICE), described).shape == (0, 32)


class Layer:
    """Experts in a slab, in another order and with gaps, as a hot tier has them."""

    def __init__(self, name: str, hidden: int, inner: int, bias: str | None = None) -> None:
        gate_up = [matrix(name, 2 * inner, hidden, seed) for seed in range(EXPERTS)]
        down = [matrix(name, hidden, inner, 100 + seed) for seed in range(EXPERTS)]
        self.biases = torch.randn(EXPERTS, 2, max(2 * inner, hidden)) if bias else None
        at = align_up(gate_up[0][0].numel(), 64)
        biases_at = align_up(at + down[0][0].numel(), 64)
        kinds: list[Bias | None] = [None, None]
        width = 0
        if self.biases is not None and bias is not None:
            self.biases = self.biases.to(DTYPES[bias])
            width = align_up(self.biases[0, 0].numel() * self.biases.element_size(), 64)
            kinds = [Bias(biases_at + which * width, DTYPES[bias]) for which in range(2)]
        stride = align_up(biases_at + 2 * width) + 4096
        slab = torch.zeros(EXPERTS * stride, dtype=torch.uint8)
        places = [(5 * expert + 2) % EXPERTS * stride for expert in range(EXPERTS)]
        for expert, place in enumerate(places):
            for offset, data in ((0, gate_up[expert][0]), (at, down[expert][0])):
                slab[place + offset : place + offset + data.numel()] = data
            if self.biases is not None:
                for which in range(2):
                    raw = self.biases[expert, which].view(torch.uint8)
                    start = place + biases_at + which * width
                    slab[start : start + raw.numel()] = raw
        self.slab = slab.to(DEVICE)
        self.slots = torch.tensor(places, dtype=torch.int64, device=DEVICE)
        self.gate_up = Operand(gate_up[0][1], 0, kinds[0])
        self.down = Operand(down[0][1], at, kinds[1])
        self.numbers = [(g[2], d[2]) for g, d in zip(gate_up, down, strict=True)]
        self.inner, self.hidden = inner, hidden

    def bias(self, expert: int, which: int, count: int) -> torch.Tensor:
        return torch.zeros(count) if self.biases is None else self.biases[expert, which, :count]


def routed(tokens: int) -> torch.Tensor:
    """Uneven choices, expert 4 of nobody, int64 [tokens, TOP_K]."""
    generator = torch.Generator().manual_seed(tokens)
    first = torch.where(torch.rand(tokens, generator=generator) < 0.6, 1, 5)
    second = torch.tensor([0, 2, 2, 3])[torch.randint(0, 4, (tokens,), generator=generator)]
    return torch.stack((first, second), 1)


def joined(gate: Gate, rows: torch.Tensor) -> torch.Tensor:
    """What is made of gate and up, as transformers has it, in fp64."""
    if gate.kind == "gpt_oss":
        first = rows[:, ::2].clamp(max=gate.limit)
        second = rows[:, 1::2].clamp(-gate.limit, gate.limit)
        return (second + 1) * first * torch.sigmoid(first * gate.alpha)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    }
    first, second = rows.chunk(2, 1)
    return functions[gate.kind](first) * second


def in_order(h: torch.Tensor, matrix: Geometry) -> torch.Tensor:
    """`h` with its columns in the model's order, fp64."""
    k = torch.arange(matrix[geometry.COLUMNS], device=h.device)
    padded = h.shape[1]
    low, high = (
        matmul.arrange(part[None].float(), matrix)[0].float() * GROWTH
        for part in (k % 128, k // 128)
    )
    place = torch.full((len(k),), -1, device=h.device)
    present = matmul.arrange(torch.ones(1, len(k), device=h.device), matrix)[0] > 0
    place[(low + 128 * high).long()[present]] = torch.arange(padded, device=h.device)[present]
    return h[:, place].cpu().double() * GROWTH


def run(
    layer: Layer,
    x: torch.Tensor,
    grouping: Grouping,
    gate: Gate,
    subsets: list[list[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both products, a launch for every subset of experts: `h` and `y`."""
    assignments = len(grouping.order)
    h = matmul.hidden(grouping, layer.down.matrix)
    y = torch.full((assignments, layer.hidden), torch.nan, device=DEVICE)
    arranged = matmul.arrange(x.to(DEVICE), layer.gate_up.matrix)
    for experts in subsets:
        tiles = grouping.tiles(experts)
        place = (grouping, tiles, layer.slab, layer.slots)
        matmul.gate_up(arranged, *place, layer.gate_up, gate, layer.down.matrix, h)
        matmul.down(h, *place, layer.down, y)
    return h, y


def assert_experts(
    layer: Layer, x: torch.Tensor, top_k: torch.Tensor, gate: Gate, grouping: Grouping,
    h: torch.Tensor, y: torch.Tensor,
) -> None:  # fmt: skip
    order, ids = grouping.order.cpu().long(), top_k.flatten()
    inner = in_order(h, layer.down.matrix)
    for expert in range(EXPERTS):
        mine = (ids[order] == expert).nonzero()[:, 0]
        gate_up, down = layer.numbers[expert]
        rows = operand(x)[order[mine] // TOP_K] @ gate_up.T
        wanted = joined(gate, rows + layer.bias(expert, 0, rows.shape[1]))
        assert ((inner[mine] - wanted).abs() <= 2**-10 * wanted.abs() + 1e-4).all()
        bias = layer.bias(expert, 1, layer.hidden)
        assert_product(y.cpu()[order[mine]] - bias, inner[mine], down)


@pytest.mark.parametrize("name", ["bf16", "f32", "q8_0", "q4_k", "q6_k", "q5_0", "nvfp4"])
def test_experts_of_every_kind_of_codec(name: str) -> None:
    layer, top_k = Layer(name, hidden=96, inner=40), routed(37)
    x = torch.randn(37, 96, generator=torch.Generator().manual_seed(5)) / 8
    grouping = matmul.group(top_k.to(DEVICE), EXPERTS)
    gate = GATES["silu"]
    h, y = run(layer, x, grouping, gate, [list(range(EXPERTS))])
    assert_experts(layer, x, top_k, gate, grouping, h, y)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("bias", [None, "bf16", "f16", "f32"])
def test_activations_and_biases(kind: str, bias: str | None) -> None:
    layer, top_k = Layer("mxfp4", hidden=64, inner=48, bias=bias), routed(20)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(6)) / 8
    grouping = matmul.group(top_k.to(DEVICE), EXPERTS)
    h, y = run(layer, x, grouping, GATES[kind], [list(range(EXPERTS))])
    assert_experts(layer, x, top_k, GATES[kind], grouping, h, y)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_experts_come_in_any_subsets(block: int) -> None:
    layer, top_k = Layer("q8_0", hidden=64, inner=32), routed(60)
    x = torch.randn(60, 64, generator=torch.Generator().manual_seed(7)) / 8
    grouping = matmul.group(top_k.to(DEVICE), EXPERTS)._replace(block=block)
    gate = GATES["silu"]
    h, y = run(layer, x, grouping, gate, [[5, 0], [4], [], [3, 1], [2]])
    assert_experts(layer, x, top_k, gate, grouping, h, y)
    for got, whole in zip((h, y), run(layer, x, grouping, gate, [list(range(6))]), strict=True):
        assert torch.equal(got, whole)


@pytest.mark.parametrize("name", ["bf16", "q4_0", "q5_0"])
def test_tiles_that_are_full_half_full_and_nearly_empty(name: str) -> None:
    counts = torch.tensor([64, 65, 1, 128, 129, 193])
    ids = torch.arange(EXPERTS).repeat_interleave(counts)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(9))]
    top_k = ids.view(-1, TOP_K)
    layer = Layer(name, hidden=64, inner=40)
    x = torch.randn(len(top_k), 64, generator=torch.Generator().manual_seed(10)) / 8
    grouping = matmul.group(top_k.to(DEVICE), EXPERTS)
    assert grouping.block == 128
    gate = GATES["silu"]
    h, y = run(layer, x, grouping, gate, [list(range(EXPERTS))])
    assert_experts(layer, x, top_k, gate, grouping, h, y)


def test_tokens_of_a_tile() -> None:
    found = [matmul.group_block(mean) for mean in (0, 16, 16.5, 32, 32.5, 64, 1000)]
    assert found == [16, 16, 32, 32, 128, 128, 128]


def test_rows_can_be_left_for_the_module_to_join() -> None:
    layer, top_k = Layer("q4_0", hidden=64, inner=40), routed(20)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(8))
    grouping = matmul.group(top_k.to(DEVICE), EXPERTS)
    rows = torch.empty(len(grouping.order), 80, device=DEVICE)
    arranged = matmul.arrange(x.to(DEVICE), layer.gate_up.matrix)
    place = (grouping, grouping.tiles(range(EXPERTS)), layer.slab, layer.slots)
    none = Gate("none")
    matmul.gate_up(arranged, *place, layer.gate_up, none, layer.down.matrix, rows)
    order = grouping.order.cpu().long()
    for expert in range(EXPERTS):
        mine = (top_k.flatten()[order] == expert).nonzero()[:, 0]
        inputs = operand(x)[order[mine] // TOP_K]
        assert_product(rows[mine.to(DEVICE)], inputs, layer.numbers[expert][0])


def test_a_grouping_is_sorted_and_stable() -> None:
    top_k = routed(50)
    grouping = matmul.group(top_k.to(DEVICE), EXPERTS)
    ids, order = top_k.flatten(), grouping.order.cpu().long()
    assert torch.equal(order, ids.argsort(stable=True))
    assert grouping.starts == (0, *ids.bincount(minlength=EXPERTS).cumsum(0).tolist())
    tiles = grouping.tiles([1, 4, 0]).cpu().tolist()
    assert (
        sum(
            end - first if end - first < grouping.block else grouping.block
            for _, first, end in tiles
        )
        == grouping.starts[2]
    )
