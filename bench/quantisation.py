"""What quantising costs and saves: the demo model's perplexity, size and speed in each codec.

    python -m tierrun.bench.quantisation

Perplexity is that of held-out Python code (bench.held_out), in windows of 1024 tokens. Speed is
decoding with every expert in memory, the median of alternating rounds.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from transformers import AutoTokenizer

import tierrun
from tierrun.bench.held_out import held_out_texts
from tierrun.bench.report import Spread, document, emit, open_console, run_script, spread
from tierrun.engine.engine import Engine
from tierrun.engine.sampling import Sampling
from tierrun.tools.demo.run import CHECKPOINT

WINDOW = 1024


class Arm(NamedTuple):
    """Codecs of the experts and of the resident weights; None keeps bf16."""

    quant: str | None
    resident: str | None

    @property
    def name(self) -> str:
        return (self.quant or "bf16") + (f", resident {self.resident}" if self.resident else "")


ARMS = (
    Arm(None, None),
    Arm("q8_0", None),
    Arm("q4_0", None),
    Arm("mxfp4", None),
    Arm("q4_0", "q8_0"),
)


class Quality(NamedTuple):
    """Perplexity over all tokens, and the store's bytes."""

    perplexity: float
    expert_bytes: int
    resident_bytes: int


def held_out_windows(limit: int) -> list[list[int]]:
    """The held-out code as windows of tokens, `limit` at most."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = [id_ for text in held_out_texts() for id_ in tokenizer(text)["input_ids"]]
    starts = range(0, len(ids) - WINDOW, WINDOW)
    return [ids[start : start + WINDOW + 1] for start in starts][:limit]


def perplexity(engine: Engine, windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of every window's tokens but its first."""
    total, count = 0.0, 0
    for window in windows:
        logits = engine.logits(window[:-1])
        targets = torch.tensor(window[1:])
        total += F.cross_entropy(logits.double(), targets, reduction="sum").item()
        count += len(targets)
    return math.exp(total / count)


def decode_speed(engine: Engine, tokens: int) -> float:
    """Tokens per second of greedy decoding after a short prompt."""
    records = engine.generate(
        "def read_lines(path):\n", tokens, sampling=Sampling(temperature=0.0), ignore_eos=True
    )
    seconds = [record.figures.seconds for record in records][1:]
    return len(seconds) / sum(seconds)


def measure(
    directory: Path, windows: Sequence[Sequence[int]], rounds: int, tokens: int
) -> dict[str, tuple[Quality, Spread]]:
    """Every arm's quality, and its speed in alternating rounds."""
    qualities: dict[str, Quality] = {}
    speeds: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS:
            store = directory / arm.name
            manifest = tierrun.convert(
                CHECKPOINT, store, quant=arm.quant, quant_resident=arm.resident
            )
            ram = str(2 * manifest.expert_bytes)
            with tierrun.load(store, vram="0", ram=ram, device="cpu") as engine:
                if number == 0:
                    value = perplexity(engine, windows)
                    sizes = manifest.expert_bytes, manifest.resident_bytes
                    qualities[arm.name] = Quality(value, *sizes)
                decode_speed(engine, tokens)  # until the experts are in memory
                speeds[arm.name].append(decode_speed(engine, tokens))
    return {name: (qualities[name], spread(speeds[name])) for name in qualities}


def _table(results: dict[str, tuple[Quality, Spread]]) -> Table:
    table = Table(title="the demo model, by codec of the experts")
    table.add_column("")
    for name in ("perplexity", "experts, MB", "resident, MB", "tok/s"):
        table.add_column(name, justify="right")
    for name, (quality, speed) in results.items():
        table.add_row(
            name,
            f"{quality.perplexity:.3f}",
            f"{quality.expert_bytes / 1e6:.1f}",
            f"{quality.resident_bytes / 1e6:.1f}",
            speed.text(0),
        )
    return table


def main(
    windows: Annotated[int, typer.Option(help="Of 1024 tokens, at most.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Of all arms.")] = 3,
    tokens: Annotated[int, typer.Option(help="Decoded per round.")] = 128,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the JSON document here.")
    ] = None,
) -> None:
    """Measure the demo model in bf16, q8_0, q4_0 and mxfp4."""
    text = held_out_windows(windows)
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), text, rounds, tokens)
    open_console().print(_table(results))
    arms: dict[str, Any] = {
        name: {**quality._asdict(), "tokens_per_second": speed._asdict()}
        for name, (quality, speed) in results.items()
    }
    figures = {"held_out_tokens": len(text) * WINDOW, "arms": arms}
    emit(document("quantisation", figures), json_file)


if __name__ == "__main__":
    run_script(main)
