"""A synthetic Mixture of Experts whose routing is as skewed as a trained one's, and its store.

Random weights route uniformly: every cache then hits c/N and nothing can be learnt. Here the
embedding has a constant dimension and every router reads a popularity from it:

- embedding rows N(0, 1), dimension 0 is 8 for every token. After RMSNorm each hidden state has the
  constant component 8/rms there, rms = sqrt((64 + H)/H);
- router row of expert e: N(0, 1)·rms/√H in every dimension, and b_e·rms/8 in dimension 0, where
  b_e ~ N(0, sigma) is the expert's popularity (sigma 2.1 fits 64 experts, top-8);
- norms 1; all other matrices N(0, 0.02), as shifted windows of one random buffer: speed does not
  depend on their values, and so the checkpoint is written as fast as the disk takes it.

    python -m tierrun.bench.synthetic SYNTHETIC

makes `checkpoint/` (Hugging Face, bf16, sharded, no tokenizer) and `store/` in that directory, then
counts, over one prompt, the share of activations that the most used experts take.
"""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tierrun.bench.checkpoint import Shape, build_checkpoint
from tierrun.bench.report import open_console, run_script
from tierrun.bench.stream import token_stream
from tierrun.engine.engine import load
from tierrun.io.extent import format_bytes
from tierrun.io.store import Manifest
from tierrun.tiers.usage import top_shares
from tierrun.tools.convert import convert

PERCENTS = (1.0, 5.0, 10.0, 15.0, 20.0, 40.0)
"""Where the skew curve is printed."""


def skew(store: Path, tokens: int, vocabulary: int, ram: str = "1GiB") -> list[float]:
    """The share of activations, mean over layers, that the top `PERCENTS` of experts take."""
    with load(store, ram=ram, ubatch=tokens, device="cpu") as engine:
        engine.session().prefill(token_stream(tokens, vocabulary, seed=1))
        curves = [top_shares(row.numpy(), PERCENTS) for row in engine.hook.usage]
    return [sum(column) / len(column) for column in zip(*curves, strict=True)]


def _print_skew(console: Console, curve: list[float], tokens: int) -> None:
    table = Table(title=f"share of activations, mean over layers, {tokens} tokens")
    table.add_column("top experts")
    for percent in PERCENTS:
        table.add_column(f"{percent:.0f} %", justify="right")
    table.add_row("share", *(f"{100 * share:.0f} %" for share in curve))
    console.print(table)


def _build_store(console: Console, checkpoint: Path, store: Path, force: bool) -> Manifest:
    started = time.perf_counter()
    manifest = convert(checkpoint, store, force=force)
    seconds = time.perf_counter() - started
    nbytes = manifest.expert_bytes + manifest.resident_bytes
    console.print(
        f"store: {manifest.num_experts} experts, {format_bytes(manifest.expert_bytes)}, "
        f"resident {format_bytes(manifest.resident_bytes)}, {seconds:.1f} s, "
        f"{nbytes / seconds / 1e9:.2f} GB/s"
    )
    return manifest


def build(
    directory: Annotated[Path, typer.Argument(help="Gets checkpoint/ and store/.")],
    layers: Annotated[int, typer.Option(help="11 of the default size are 6.2 GiB.")] = 11,
    experts: Annotated[int, typer.Option(help="Per layer.")] = 64,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 8,
    sigma: Annotated[float, typer.Option(help="Skew: 2.1 for 64/8, 1.35 for 128/8.")] = 2.1,
    seed: Annotated[int, typer.Option(help="Of all weights.")] = 0,
    tokens: Annotated[int, typer.Option(help="Prompt that counts the skew; 0: none.")] = 256,
    force: Annotated[bool, typer.Option(help="Replace a store that is there.")] = False,
) -> None:
    """Build the synthetic checkpoint and its store, and print the skew that came out."""
    console = open_console()
    shape = Shape(layers=layers, experts=experts, top_k=top_k, sigma=sigma)
    checkpoint, store = directory / "checkpoint", directory / "store"
    started = time.perf_counter()
    total = build_checkpoint(checkpoint, shape, seed)
    seconds = time.perf_counter() - started
    console.print(
        f"checkpoint: {format_bytes(total)}, {seconds:.1f} s, {total / seconds / 1e9:.2f} GB/s"
    )
    _build_store(console, checkpoint, store, force)
    if tokens:
        _print_skew(console, skew(store, tokens, shape.vocabulary), tokens)


if __name__ == "__main__":
    run_script(build)
