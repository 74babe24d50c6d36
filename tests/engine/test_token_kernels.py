"""A token's compiled calls, each beside the same in torch."""

import math

import pytest
import torch
from tests.codecs import random_fields

from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import pack
from tierrun.engine.kernels import prompt_rows, reals
from tierrun.engine.kernels.int8_linear import Int8Linear
from tierrun.engine.kernels.token_attention import SPAN, Heads, TokenAttention
from tierrun.engine.kernels.token_products import TokenProducts
from tierrun.engine.kernels.token_router import TokenRouter
from tierrun.engine.kernels.workers import Workers
from tierrun.engine.recognise import RmsNorm


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (1, 2048), (3, 100), (16, 33)])
def test_rms_norms(rows: int, count: int) -> None:
    x, scale = torch.randn(rows, count), torch.randn(count)
    wanted = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    reals.rms_norm(x.data_ptr(), scale.data_ptr(), rows, count, 1e-6, x.data_ptr())
    torch.testing.assert_close(x.double(), wanted, rtol=1e-5, atol=1e-6)


def test_exponentials_and_their_sum() -> None:
    x = torch.cat([-torch.rand(777) * 90, torch.tensor([0.0, -0.5, -1e-8, -200.0, -math.inf])])
    wanted = x.double().exp()
    total = reals.exponentials(x.data_ptr(), 0.0, len(x))
    torch.testing.assert_close(x.double(), wanted, rtol=1e-6, atol=1e-37)
    assert total == pytest.approx(float(wanted.sum()), rel=1e-6)
    spoilt = torch.tensor([0.0, math.nan])
    assert math.isnan(reals.exponentials(spoilt.data_ptr(), 0.0, 2)) and spoilt[1].isnan()


def test_a_weighted_sum_is_taken_in_the_order_of_its_rows() -> None:
    x, weights, y = torch.randn(8, 77), torch.rand(8), torch.empty(77)
    reals.weighted_sum(x.data_ptr(), weights.data_ptr(), 8, 77, y.data_ptr())
    wanted = torch.zeros(77)
    for row, weight in zip(x, weights, strict=True):
        wanted = row * weight + wanted
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_weighted_sums_of_a_prompt_have_the_bits_of_a_tokens(tokens: int, threads: int) -> None:
    x, weights = torch.randn(tokens, 8, 2048), torch.rand(tokens, 8)
    wanted = torch.empty(tokens, 2048)
    for given, row, y in zip(x, weights, wanted, strict=True):
        reals.weighted_sum(given.data_ptr(), row.data_ptr(), 8, 2048, y.data_ptr())
    assert torch.equal(prompt_rows.weighted_sums(Workers(threads), x, weights), wanted)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 100, 64), (1, 77, 2048)])
def test_norms_of_a_prompt_have_the_bits_of_a_tokens(shape: tuple[int, ...], threads: int) -> None:
    x, scale = torch.randn(shape), torch.rand(shape[-1])
    wanted = torch.empty(shape)
    rows, given = x.numel() // shape[-1], (x.data_ptr(), scale.data_ptr())
    reals.rms_norm(*given, rows, shape[-1], 1e-5, wanted.data_ptr())
    assert torch.equal(prompt_rows.norm(Workers(threads), x, scale, 1e-5), wanted)


def matrix(codec: str, rows: int, columns: int) -> Packed:
    found = find_codec(codec)
    data = pack(found, random_fields(found, rows, columns))
    return Packed.over(data, found, torch.Size((rows, columns)), None)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("codec", ["q4_k", "q8_0", "mxfp4"])
def test_products_side_by_side_have_the_bits_of_single_ones(codec: str, threads: int) -> None:
    weights = [matrix(codec, rows, 512) for rows in (70, 32, 2081)]
    bias, x = torch.randn(32), torch.randn(1, 512)
    found = TokenProducts(weights, [None, bias, None], Workers(threads))(x)
    single = [Int8Linear(1)(x, weight)[0] for weight in weights]
    single[1] = single[1] + bias
    assert torch.equal(found, torch.cat(single))


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("busy", [True, False])
def test_routers(renormalise: bool, busy: bool) -> None:
    weight, x, workers = torch.randn(70, 96), torch.randn(1, 96), Workers(2)
    if busy:
        workers.claim()
    logits, scores, chosen = TokenRouter(weight, 5, renormalise, workers)(x)
    wanted, indices = (x @ weight.T).softmax(-1).topk(5)
    torch.testing.assert_close(logits, x @ weight.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(chosen, indices)
    wanted = wanted / wanted.sum() if renormalise else wanted
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-7)


def test_the_first_of_equal_experts_is_chosen_and_nan_stays_nan() -> None:
    router = TokenRouter(torch.zeros(9, 32), 3, True, Workers(1))
    assert router(torch.ones(1, 32))[2].tolist() == [[0, 1, 2]]
    _, scores, chosen = router(torch.full((1, 32), math.nan))
    assert scores.isnan().all() and (chosen < 9).all()


def attend(
    attention: TokenAttention, x: torch.Tensor, angles: torch.Tensor, length: int, room: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output at position `length`, with random keys and values before; these after it."""
    torch.manual_seed(length)
    shape = 1, attention.heads.keys, room, attention.heads.size
    keys, values = torch.randn(shape) * 3, torch.randn(shape)
    y = attention(x, (angles.cos(), angles.sin()), (keys, values), length)
    return y, keys[:, :, : length + 1], values[:, :, : length + 1]


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """By halves, as most architectures do."""
    turned, rest = x[..., : len(angles)], x[..., len(angles) :]
    half = len(angles) // 2
    other = torch.cat((-turned[..., half:], turned[..., :half]), -1)
    return torch.cat((turned * angles.cos() + other * angles.sin(), rest), -1)


@pytest.mark.parametrize("rotated", [64, 32])
@pytest.mark.parametrize("norms", ["none", "of heads", "of all"])
def test_attention_of_one_token(rotated: int, norms: str) -> None:
    heads, workers = Heads(4, 2, 64, 0.2, rotated), Workers(2)
    project = TokenProducts(
        [matrix("q8_0", rows, 96) for rows in (256, 128, 128)], [None] * 3, workers
    )
    back = TokenProducts([matrix("q8_0", 96, 256)], [None], workers)
    widths = {"none": None, "of heads": (64, 64), "of all": (256, 128)}[norms]
    known = [RmsNorm(torch.rand(width) + 0.5, 1e-6) for width in widths] if widths else [None] * 2
    attention = TokenAttention(heads, project, back, *known)
    x, angles = torch.randn(1, 1, 96), torch.rand(rotated // 2).repeat(2) * 3
    mine = project(x).split([256, 128, 128])
    queries, own = (
        part if norm is None else normed(part, norm)
        for part, norm in zip(mine[:2], known, strict=True)
    )
    queries, own = rotate(queries.view(4, 64), angles), rotate(own.view(2, 64), angles)
    for length in (0, 1, 63, 64, SPAN - 1, SPAN, 3 * SPAN + 5):
        y, keys, values = attend(attention, x, angles, length, length + 7)
        torch.testing.assert_close(keys[0, :, length], own, rtol=1e-5, atol=1e-5)
        assert torch.equal(values[0, :, length].flatten(), mine[2])
        scores = torch.einsum("ghd,gld->ghl", queries.view(2, 2, 64), keys[0]) * 0.2
        mixed = torch.einsum("ghl,gld->ghd", scores.softmax(-1), values[0])
        wanted = back(mixed.contiguous())
        assert (y - wanted).norm() < 3e-3 * wanted.norm()  # a code may differ by one


def normed(x: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
    rows = x.view(-1, norm.scale.numel())
    return rows / (rows.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.scale


def test_attention_has_the_same_bits_with_any_number_of_threads() -> None:
    weights = [matrix("q4_0", rows, 64) for rows in (128, 64, 64)], matrix("q4_0", 64, 128)
    x, angles, found = torch.randn(1, 1, 64), torch.rand(32), []
    for threads in (1, 2, 3):
        workers = Workers(threads)
        products = TokenProducts(weights[0], [None] * 3, workers)
        back = TokenProducts([weights[1]], [None], workers)
        attention = TokenAttention(Heads(4, 2, 32, 0.2, 32), products, back, None, None)
        found.append(attend(attention, x, angles, 2 * SPAN + 9, 1000)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
