"""Decode a fixed token stream on a store, once, in this process: what the other benchmarks run
inside a memory cgroup. Prints one JSON document.

    python -m tierrun.bench.decode STORE --ram 1GiB --warmup 32 --tokens 32

A prompt of 8 tokens and then `warmup` tokens come first and are not measured: the cache learns from
them what the stream wants.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tierrun.bench.peak import peak_rss
from tierrun.bench.report import run_script
from tierrun.bench.stream import token_stream
from tierrun.engine.engine import Engine, load
from tierrun.engine.tokens import TokenRecord
from tierrun.io.tickets import QueueFigures
from tierrun.tiers.ledger import Counters, LayerTiming

PROMPT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """The measured tokens of one run: seconds by token, the ledger's part of them, memory."""

    load_seconds: float
    seconds: list[float]
    counters: Counters
    timings: list[LayerTiming]
    mean_depth: float
    record_bytes: int
    resident_bytes: int
    warm_bytes: int
    peak_rss: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return len(self.seconds) / self.total_seconds

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "DecodeRun":
        fields: dict[str, Any] = json.loads(text)
        fields["counters"] = Counters(**fields["counters"])
        fields["timings"] = [LayerTiming(*row) for row in fields["timings"]]
        return DecodeRun(**fields)


def decode(engine: Engine, load_seconds: float, warmup: int, tokens: int) -> DecodeRun:
    """Feed the fixed stream; what the last `tokens` of it cost."""
    records = _records(engine, warmup + tokens)
    for _ in range(1 + warmup):  # the first record is the prompt's
        next(records)
    counters, timings = engine.ledger.snapshot(), len(engine.ledger.timings)
    queue = engine.queue.figures()
    seconds = [_timed(records) for _ in range(tokens)]
    stats = engine.stats()
    return DecodeRun(
        load_seconds=load_seconds,
        seconds=seconds,
        counters=engine.ledger.snapshot() - counters,
        timings=list(engine.ledger.timings)[timings:],
        mean_depth=_mean_depth(queue, engine.queue.figures()),
        record_bytes=max(c.nbytes for c in engine.store.manifest.classes),
        resident_bytes=stats.resident_bytes,
        warm_bytes=stats.warm_bytes,
        peak_rss=peak_rss(),
    )


def _records(engine: Engine, steps: int) -> Iterator[TokenRecord]:
    vocabulary = engine.model.config.get_text_config().vocab_size
    stream = token_stream(PROMPT_TOKENS + steps + 1, vocabulary)
    prompt, fixed = stream[:PROMPT_TOKENS], stream[PROMPT_TOKENS:]
    return engine.generate(prompt, len(fixed), fixed=fixed, ignore_eos=True)


def _timed(records: Iterator[TokenRecord]) -> float:
    started = time.perf_counter()
    next(records)
    return time.perf_counter() - started


def _mean_depth(before: QueueFigures, after: QueueFigures) -> float:
    busy = after.busy_seconds - before.busy_seconds
    return (after.record_seconds - before.record_seconds) / busy if busy > 0 else 0.0


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    ram: Annotated[str, typer.Option(help="Budget for experts.")] = "1GiB",
    warmup: Annotated[int, typer.Option(help="Tokens before the measured ones.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens measured.")] = 32,
    lookahead: Annotated[bool, typer.Option(help="Read ahead for the next layer.")] = True,
    threads: Annotated[int, typer.Option(help="0: all cores but one.")] = 0,
) -> None:
    """Decode a fixed stream of tokens and print what it cost, as JSON."""
    started = time.perf_counter()
    with load(store, ram=ram, lookahead=lookahead, threads=threads, device="cpu") as engine:
        run = decode(engine, time.perf_counter() - started, warmup, tokens)
    print(run.to_json())


if __name__ == "__main__":
    run_script(main)
