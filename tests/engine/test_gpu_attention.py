"""Decode attention against fp64, interpreted on the CPU where there is no GPU."""

from typing import NamedTuple

import pytest
import torch

from tierrun.engine.kernels.attention import Config, attend, choose_config, supports

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the cache, and what a result may be off by."""

SHORT = Config(rows=16, block=16, blocks=2, programs=6, warps=4, stages=2)
"""Splits so short that small caches have many, and programs that compute several."""


class Inputs(NamedTuple):
    """What `attend` takes first."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor


def make(
    heads: int = 4,
    key_heads: int = 2,
    tokens: int = 1,
    length: int = 200,
    columns: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    visible: tuple[int, int] | None = None,
) -> Inputs:
    """Random numbers; each token sees one position more than the last, and one less before."""
    generator = torch.Generator().manual_seed(heads + 10 * tokens + length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    query = random(1, heads, tokens, columns[0])
    key = random(1, key_heads, length, columns[0]).to(dtype)
    value = random(1, key_heads, length, columns[1]).to(dtype)
    first, last = visible or (0, length - tokens + 1)
    mask = torch.zeros(1, 1, tokens, length, dtype=torch.bool, device=DEVICE)
    for token in range(tokens):
        mask[..., token, max(0, first + token - tokens + 1) : last + token] = True
    return Inputs(query, key, value, mask)


def wanted(
    inputs: Inputs,
    scaling: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same in fp64, plainly; float masks are added."""
    query, key, value, mask = inputs
    groups = query.shape[1] // key.shape[1]
    query = query.to(key.dtype).double()
    key, value = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


def check(
    inputs: Inputs,
    config: Config | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> None:
    scaling = inputs.query.shape[-1] ** -0.5
    result = attend(*inputs, scaling, sinks, softcap, config)
    expected = wanted(inputs, scaling, sinks, softcap)
    assert result.shape == expected.shape and result.is_contiguous()
    assert result.dtype == torch.float32
    assert (result - expected).abs().max() < DTYPES[inputs.key.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_heads_and_tokens(tokens: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make(*heads, tokens=tokens, dtype=dtype)
    check(inputs)
    check(inputs, SHORT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [(8, 8), (20, 12), (80, 80), (192, 128), (33, 65), (16, 256)])
def test_columns_that_are_no_powers_of_two(columns: tuple[int, int], dtype: torch.dtype) -> None:
    check(make(columns=columns, dtype=dtype, length=70))


def test_the_widest_keys() -> None:
    check(make(columns=(576, 512), dtype=torch.bfloat16, length=40))
    check(make(columns=(512, 512), length=40, tokens=8))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("visible", [(0, 1), (5, 9), (60, 130), (195, 198), (32, 64)])
def test_windows(visible: tuple[int, int], tokens: int) -> None:
    check(make(tokens=tokens, visible=visible), SHORT)


def test_holes() -> None:
    inputs = make(tokens=2)
    inputs.mask[..., 20:150] = False
    inputs.mask[..., 0, 90] = True
    check(inputs, SHORT)


@pytest.mark.parametrize("config", [None, SHORT])
def test_rows_that_see_nothing_are_zero(config: Config | None) -> None:
    inputs = make(tokens=3)
    inputs.mask[..., 1, :] = False
    check(inputs, config)
    inputs.mask[:] = False
    result = attend(*inputs, 1.0, torch.zeros(4, device=DEVICE), config=config)
    assert not result.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_sinks_and_softcap(with_sinks: bool, softcap: float | None, dtype: torch.dtype) -> None:
    sinks = torch.tensor([3.0, -50.0, 0.5, 40.0], device=DEVICE) if with_sinks else None
    check(make(tokens=2, dtype=dtype, visible=(40, 120)), SHORT, sinks, softcap)


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("tokens", [1, 2])
def test_masks_that_are_added(tokens: int, lowest: float) -> None:
    query, key, value, mask = make(tokens=tokens, visible=(70, 150))
    slope = torch.linspace(-2, 0, 200, device=DEVICE).expand(mask.shape)
    check(Inputs(query, key, value, slope.masked_fill(~mask, lowest)), SHORT)
    check(Inputs(query, key, value, slope), SHORT)


def test_no_mask_shows_everything() -> None:
    inputs = make(tokens=2, length=77)
    result = attend(*inputs[:3], None, 0.25)
    inputs.mask[:] = True
    assert (result - wanted(inputs, 0.25)).abs().max() < 1e-5


def test_strided_views() -> None:
    inputs = make(tokens=2, columns=(24, 24))
    query, key, value = (torch.empty_like(t.transpose(1, 2)) for t in inputs[:3])
    views = [t.transpose(1, 2).copy_(s) for t, s in zip((query, key, value), inputs, strict=False)]
    wide = torch.zeros(1, 1, 8, 400, dtype=torch.bool, device=DEVICE)
    view = wide[..., 3:5, ::2].copy_(inputs.mask)
    check(Inputs(*views, view), SHORT)
    both = torch.cat([inputs.key, inputs.value], -1)
    check(Inputs(views[0], both[..., :24], both[..., 24:], inputs.mask), SHORT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_cache_s_length_changes_no_bit(tokens: int, dtype: torch.dtype) -> None:
    short = make(tokens=tokens, length=150, dtype=dtype, visible=(37, 140))
    for config in (None, SHORT):
        results = [attend(*longer(short, length), 0.25, config=config) for length in LENGTHS]
        assert all(torch.equal(result, results[0]) for result in results[1:])


LENGTHS = (150, 151, 400) if DEVICE == "cpu" else (150, 151, 160, 1024, 8192, 131072)


def longer(inputs: Inputs, length: int) -> Inputs:
    """The same in a longer cache, with garbage in the rest of it."""
    held = inputs.key.shape[2]
    _, heads, _, columns = inputs.key.shape
    key, value = (t.new_full((1, heads, length, columns), torch.nan) for t in inputs[1:3])
    mask = inputs.mask.new_zeros(1, 1, inputs.mask.shape[2], length)
    for long, short in zip((key, value), inputs[1:3], strict=True):
        long[:, :, :held] = short
    mask[..., :held] = inputs.mask
    return Inputs(inputs.query, key, value, mask)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are CUDA's")
def test_a_graph_follows_the_mask() -> None:
    inputs = make(32, 4, length=4096, columns=(128, 128), dtype=torch.bfloat16)
    attend(*inputs, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attend(*inputs, 0.1)
    for visible in (1, 1000, 4000, 64):
        inputs.mask[:] = False
        inputs.mask[..., :visible] = True
        graph.replay()
        assert torch.equal(result, attend(*inputs, 0.1))
        assert (result - wanted(inputs, 0.1)).abs().max() < 1e-2


def test_what_is_not_supported() -> None:
    query, key, value, mask = make(tokens=2)
    assert supports(query, key, value, mask, torch.zeros(4))
    assert supports(query, key, value)
    assert not supports(query.expand(2, -1, -1, -1), key, value)
    assert not supports(query[:, :3], key, value)
    assert supports(query, key.half(), value.half())
    assert not supports(query, key, value.bfloat16())
    assert not supports(query, key, value, mask[..., :-1])
    assert not supports(query, key, value, mask, torch.zeros(2))
    assert not supports(query.repeat(1, 1, 5, 1), key, value)
    assert not supports(query.mT, key, value)
    assert not supports(query.repeat(1, 1, 1, 40), key.repeat(1, 1, 1, 40), value)


def test_the_split_does_not_depend_on_the_length() -> None:
    found = {
        choose_config(
            torch.empty(1, 32, 1, 128, device="meta"),
            torch.empty(1, 4, length, 128, dtype=torch.bfloat16, device="meta"),
            torch.empty(1, 4, length, 128, dtype=torch.bfloat16, device="meta"),
        )
        for length in (1, 100, 4096, 131072)
    }
    assert len(found) == 1
