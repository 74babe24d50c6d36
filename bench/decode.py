"""Decode a fixed token stream on a store, once, in this process: what `tierrun bench peers` runs
inside a memory cgroup. Prints one JSON document.

    python -m tierrun.bench.decode STORE --ram 1GiB --warmup 32 --tokens 32

The order is llama-bench's: where prompts are asked for, the second of two comes first; then tokens
that are not measured, from which the cache learns what the stream wants (`warmup` of them after a
prompt of 8); then, in a context of their own after another prompt of 8, those that are.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tierrun.bench.model_bench import forget_usage
from tierrun.bench.peak import peak_rss
from tierrun.bench.report import run_script
from tierrun.bench.stream import routing_of, token_stream
from tierrun.bench.synthetic_models import Routing
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
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0

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


def decode(
    engine: Engine,
    load_seconds: float,
    warmup: int,
    tokens: int,
    prompt: int = 0,
    routing: Routing | None = None,
) -> DecodeRun:
    """Feed the stream (of the store's routing, if no other is named); what a prompt of `prompt`
    and then `tokens` after `warmup` cost."""
    stream = _stream(engine, 2 * (prompt + PROMPT_TOKENS + 1) + warmup + tokens, routing)
    prompt_seconds = _prompt_seconds(engine, _take(stream, prompt), _take(stream, prompt))
    for _ in _records(engine, _take(stream, PROMPT_TOKENS + warmup + 1)):
        pass
    records = _records(engine, stream)
    next(records)  # the prompt's
    counters, timings = engine.ledger.snapshot(), len(engine.ledger.timings)
    queue = engine.queue.figures()
    seconds = [_timed(records) for _ in range(tokens)]
    decoded = engine.ledger.snapshot() - counters, list(engine.ledger.timings)[timings:]
    mean_depth, stats = _mean_depth(queue, engine.queue.figures()), engine.stats()
    return DecodeRun(
        load_seconds=load_seconds,
        seconds=seconds,
        counters=decoded[0],
        timings=decoded[1],
        mean_depth=mean_depth,
        record_bytes=max(c.nbytes for c in engine.store.manifest.classes),
        resident_bytes=stats.resident_bytes,
        warm_bytes=stats.warm_bytes,
        prompt_tokens=prompt,
        prompt_seconds=prompt_seconds,
        peak_rss=peak_rss(),
    )


def _take(stream: list[int], count: int) -> list[int]:
    """The next `count` tokens, which are gone from it."""
    taken = stream[:count]
    del stream[:count]
    return taken


def _prompt_seconds(engine: Engine, before: list[int], measured: list[int]) -> float:
    """Of a prompt, after another; 0 where they are empty."""
    if not measured:
        return 0.0
    engine.session().prefill(before)
    session, started = engine.session(), time.perf_counter()
    session.prefill(measured)
    return time.perf_counter() - started


def _stream(engine: Engine, count: int, routing: Routing | None) -> list[int]:
    config = engine.model.config
    vocabulary: int = config.get_text_config().vocab_size
    return token_stream(count, vocabulary, routing=routing or routing_of(config))


def _records(engine: Engine, stream: list[int]) -> Iterator[TokenRecord]:
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
    vram: Annotated[str, typer.Option(help="The same in VRAM.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N.")] = "cpu",
    warmup: Annotated[int, typer.Option(help="Tokens before the measured ones.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens measured.")] = 32,
    prompt: Annotated[int, typer.Option(help="Tokens of a measured prompt; 0: none.")] = 0,
    routing: Annotated[
        Routing | None, typer.Option(help="Of the stream. Default: the store's.")
    ] = None,
    lookahead: Annotated[bool, typer.Option(help="Read ahead for the next layer.")] = True,
    threads: Annotated[int, typer.Option(help="0: all cores; torch one less.")] = 0,
) -> None:
    """Decode a fixed stream of tokens and print what it cost, as JSON."""
    started = time.perf_counter()
    options = dict(ram=ram, vram=vram, device=device, lookahead=lookahead, threads=threads)
    with load(store, **options) as engine:
        loaded = time.perf_counter() - started
        run = decode(engine, loaded, warmup, tokens, prompt, routing)
        forget_usage(engine)
    print(run.to_json())


if __name__ == "__main__":
    run_script(main)
