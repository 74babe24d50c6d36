"""Decode attention on the device: right against fp64, and as fast as what?

    python -m tierrun.bench.kernels_attention [--sweep qwen3]

Every case is checked, then timed in a CUDA graph that goes through several caches in turn, so that
keys and values come from memory and not from L2, against torch's scaled_dot_product_attention with
the same mask: with enable_gqa, and with the query heads of a key head folded into rows. A table
goes to stdout, JSON to $OUT/attention.json.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch.nn.functional import scaled_dot_product_attention

from tierrun.engine.kernels.attention import Config, attend, choose_config

COLD_BYTES = 192 << 20
"""Visible keys and values of all caches of a graph together: several times an L2."""
MOST_BYTES = 8 << 30
"""Of all caches, allocated."""
REPLAYS = 15


class Case(NamedTuple):
    """What is attended to: `visible` of `length` positions."""

    name: str
    heads: int
    key_heads: int
    columns: int
    value_columns: int
    tokens: int
    visible: int
    length: int

    @property
    def visible_bytes(self) -> int:
        """Of keys and values in bf16."""
        return 2 * self.visible * self.key_heads * (self.columns + self.value_columns)


class Cache(NamedTuple):
    """One layer's."""

    key: torch.Tensor
    value: torch.Tensor


class Times(NamedTuple):
    """Microseconds per call, and the largest error of ours."""

    ours: float
    gqa: float
    folded: float
    error: float


Call = Callable[[Cache], torch.Tensor]


def cases() -> Iterator[Case]:
    """The shapes of some models at several lengths."""
    for visible, length in ((1024, 4096), (1024, 131072), (4096, 8192), (32768, 32768)):
        yield Case("qwen3", 32, 4, 128, 128, 1, visible, length)
    for visible, length in ((1024, 4096), (32768, 131072)):
        yield Case("qwen3", 32, 4, 128, 128, 8, visible, length)
        yield Case("gpt-oss", 64, 8, 64, 64, 1, visible, length)
    yield Case("gemma", 16, 8, 256, 256, 1, 1024, 4096)
    yield Case("gemma", 16, 2, 512, 512, 1, 4096, 8192)
    for tokens in (1, 8):
        yield Case("deepseek", 128, 128, 192, 128, tokens, 1024, 4096)


def run(case: Case, config: Config | None = None, *, alone: bool = False) -> Times:
    """Check and time; `alone`: only ours."""
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(
        1, case.heads, case.tokens, case.columns, device="cuda", generator=generator
    )
    mask = _mask(case)
    scale = case.columns**-0.5
    caches = _caches(case, generator)

    def ours(cache: Cache) -> torch.Tensor:
        return attend(query, cache.key, cache.value, mask, scale, config=config)

    expected = _exact(query, caches[0], mask, scale, case)
    error = (ours(caches[0]) - expected).abs().max().item() / expected.abs().max().item()
    gqa, folded = _torch(query.bfloat16(), mask, scale, case)
    nan = float("nan")
    others = (nan, nan) if alone else (_measure(gqa, caches), _measure(folded, caches))
    return Times(_measure(ours, caches), *others, error)


def _mask(case: Case) -> torch.Tensor:
    mask = torch.zeros(1, 1, case.tokens, case.length, dtype=torch.bool, device="cuda")
    for token in range(case.tokens):
        mask[..., token, : case.visible - case.tokens + token + 1] = True
    return mask


def _caches(case: Case, generator: torch.Generator) -> list[Cache]:
    allocated = case.visible_bytes // case.visible * case.length
    count = max(2, min(COLD_BYTES // case.visible_bytes, MOST_BYTES // allocated, 64))
    shape = (1, case.key_heads, case.length)

    def fresh(columns: int) -> torch.Tensor:
        data = torch.zeros(*shape, columns, dtype=torch.bfloat16, device="cuda")
        data[:, :, : case.visible].normal_(generator=generator)
        return data

    return [Cache(fresh(case.columns), fresh(case.value_columns)) for _ in range(count)]


def _exact(
    query: torch.Tensor, cache: Cache, mask: torch.Tensor, scale: float, case: Case
) -> torch.Tensor:
    groups = case.heads // case.key_heads
    rows = query.bfloat16().double().reshape(1, case.key_heads, groups, *query.shape[2:])
    key, value = (t[:, :, None, : case.visible].double() for t in cache)
    scores = torch.einsum("bhgtd,bhxld->bhgtl", rows, key) * scale
    weights = scores.masked_fill(~mask[:, :, None, :, : case.visible], -torch.inf).softmax(-1)
    return torch.einsum("bhgtl,bhxld->bhgtd", weights, value).flatten(1, 2).transpose(1, 2)


def _torch(query: torch.Tensor, mask: torch.Tensor, scale: float, case: Case) -> tuple[Call, Call]:
    """What torch has: with `enable_gqa`, and with rows folded."""
    groups = case.heads // case.key_heads
    rows = query.reshape(1, case.key_heads, groups * case.tokens, case.columns)
    row_mask = mask.repeat(1, 1, groups, 1)

    def gqa(cache: Cache) -> torch.Tensor:
        return scaled_dot_product_attention(
            query, *cache, attn_mask=mask, scale=scale, enable_gqa=True
        )

    def folded(cache: Cache) -> torch.Tensor:
        return scaled_dot_product_attention(rows, *cache, attn_mask=row_mask, scale=scale)

    return gqa, folded


def _measure(call: Call, caches: list[Cache]) -> float:
    """Microseconds of one call, as the median replay of a graph of one per cache has it."""
    graph = torch.cuda.CUDAGraph()
    call(caches[0])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for cache in caches:
            call(cache)
    found = [_replay(graph) / len(caches) for _ in range(REPLAYS)]
    return median(found[2:])


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds."""
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000


def _sweep(name: str) -> Iterator[tuple[Case, Config]]:
    """Launch parameters around the chosen ones, for the cases called `name`."""
    for case in (case for case in cases() if case.name == name):
        key = torch.empty(
            1, case.key_heads, case.length, case.columns, dtype=torch.bfloat16, device="meta"
        )
        query = torch.empty(1, case.heads, case.tokens, case.columns, device="meta")
        chosen = choose_config(query, key, key[..., : case.value_columns])
        yield case, chosen
        for split in (16, 32, 64, 128, 256, 512):
            for block in (chosen.block // 2, chosen.block, chosen.block * 2):
                for stages in (1, 2, 3) if split > block else (1,):
                    if 16 <= block <= split:
                        blocks = split // block
                        yield case, chosen._replace(block=block, blocks=blocks, stages=stages)
        for programs in (256, 512, 2048, 4096):
            yield case, chosen._replace(programs=programs)
        yield case, chosen._replace(warps=12 - chosen.warps)


def _row(case: Case, times: Times) -> str:
    shape = f"{case.heads}/{case.key_heads}×{case.columns}/{case.value_columns}"
    rate = case.visible_bytes / times.ours * 1e-3
    return (
        f"{case.name:9} {shape:15} T {case.tokens}  {case.visible:6} of {case.length:6}  "
        f"ours {times.ours:7.1f} µs ({rate:6.0f} GB/s)  gqa {times.gqa:8.1f}  "
        f"folded {times.folded:8.1f}  error {times.error:.1e}"
    )


def main(
    sweep: Annotated[str, typer.Option(help="Of cases so called, other launches too.")] = "",
) -> None:
    """Check and time decode attention."""
    print(torch.cuda.get_device_name())
    out = Path(os.environ.get("OUT", ".")) / "attention.json"
    rows: list[dict[str, object]] = []
    for case in () if sweep else cases():
        times = run(case)
        print(_row(case, times), flush=True)
        rows.append({**case._asdict(), **times._asdict()})
        out.write_text(json.dumps(rows, indent=1))
        if not times.error < 2e-2:
            raise SystemExit("wrong")
    for case, config in _sweep(sweep):
        rows.append(_tried(case, config))
        out.write_text(json.dumps(rows, indent=1))


def _tried(case: Case, config: Config) -> dict[str, object]:
    """One row of a sweep."""
    try:
        times: Times | str = run(case, config, alone=True)
    except Exception as error:  # does not fit, or does not compile
        times = str(error)[:80]
    text = times if isinstance(times, str) else f"{times.ours:7.1f}"
    print(f"{case.name} T {case.tokens} {case.visible}/{case.length} {text} {config}", flush=True)
    found = {"failed": times} if isinstance(times, str) else times._asdict()
    return {**case._asdict(), **found, "config": config._asdict()}


if __name__ == "__main__":
    typer.run(main)
