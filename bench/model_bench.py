"""`tierrun bench model`: one engine, fed the stream, repetition by repetition.

As in llama-bench each repetition of a test begins with an empty context, which is filled to the
test's depth before the clock starts; loading is not measured. What differs is that experts have to
be learnt: first `learn` tokens are decoded, then one repetition of each test goes unmeasured, and
every repetition goes on where the stream was, so that none is fed what the last one has just read.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tierrun.bench.devices import say, synchronise
from tierrun.bench.model_bound import Rates, bound_of, traffic_of
from tierrun.bench.model_plan import SETTLING, Case, Plan
from tierrun.bench.stream import routing_of, token_stream
from tierrun.engine.engine import Engine
from tierrun.engine.sampling import FixedTokens
from tierrun.tiers.ledger import Counters

_WARM_STEPS = 8
"""Tokens that a CPU generates before a test's first repetition; a GPU does the whole test once."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """Some tokens of a test: how long they took, and what the ledger counted. `passes`: forward
    passes."""

    tokens: int
    seconds: float
    counters: Counters
    passes: int


class Figures(NamedTuple):
    """What a repetition is told as; the order of the metrics. Bytes per token, shares of one."""

    tokens_per_second: float
    hot: float
    warm: float
    cold: float
    read_bytes: float
    bus_bytes: float
    bound: float
    share_of_bound: float


class Told(NamedTuple):
    """The figures, and what sets the bound."""

    figures: Figures
    by: str


class Runner:
    """Runs the tests of `plan` on one engine."""

    def __init__(self, engine: Engine, device: str, plan: Plan) -> None:
        self._engine, self._device, self._plan = engine, device, plan
        config = engine.model.config
        self.vocabulary: int = config.get_text_config().vocab_size
        self._stream = token_stream(plan.stream, self.vocabulary, routing=routing_of(config))
        self._position = max(test.depth for test in plan.tests)

    def learn(self) -> None:
        """Fill VRAM, and decode the first tokens."""
        if self._plan.warm and self._device != "cpu":
            self._engine.warm_up()
        if self._plan.learn:
            self._generate(0, self._plan.learn)

    def run(self, test: Case) -> list[Repetition]:
        """All its repetitions, after one that does not count; no more than the plan has time for,
        but one."""
        if self._plan.warm:
            if test.kind == "pp":
                self._prompt(test.depth, test.tokens)
            else:
                few = self._device == "cpu"
                self._generate(test.depth, min(_WARM_STEPS, test.tokens) if few else test.tokens)
        started, done = time.perf_counter(), list[Repetition]()
        while len(done) < self._plan.repetitions:
            run = self._prompt if test.kind == "pp" else self._generate
            done.append(run(test.depth, test.tokens))
            speed = done[-1].tokens / done[-1].seconds
            say(f"{test.name}: {speed:.2f} tok/s")
            spent, limit = time.perf_counter() - started, self._plan.seconds
            if limit is not None and spent >= limit:
                break
        return done

    def _prompt(self, depth: int, tokens: int) -> Repetition:
        session = self._engine.session()
        behind, prompt = self._next(depth, tokens)
        if behind:
            session.prefill(behind)
        passes = -(-tokens // self._engine.backend.chunk)
        before, started = self._begin()
        session.prefill(prompt)
        return self._end(tokens, passes, before, started)

    def _generate(self, depth: int, tokens: int) -> Repetition:
        session, settling = self._engine.session(), 0 if self._device == "cpu" else SETTLING
        behind, fed = self._next(depth, settling + tokens)
        if behind:
            session.prefill(behind)
        chooser = FixedTokens(fed)
        for token in fed[:settling]:
            session.step(token, chooser)
        before, started = self._begin()
        for token in fed[settling:]:
            session.step(token, chooser)
        return self._end(tokens, tokens, before, started)

    def _next(self, depth: int, tokens: int) -> tuple[list[int], list[int]]:
        """The next tokens of the stream, and the `depth` before them."""
        here = self._position
        self._position += tokens
        return self._stream[here - depth : here], self._stream[here : here + tokens]

    def _begin(self) -> tuple[Counters, float]:
        synchronise(self._device)
        return self._engine.ledger.snapshot(), time.perf_counter()

    def _end(self, tokens: int, passes: int, before: Counters, started: float) -> Repetition:
        synchronise(self._device)
        seconds = time.perf_counter() - started
        return Repetition(tokens, seconds, self._engine.ledger.snapshot() - before, passes)

    def told(self, done: Repetition, rates: Rates) -> Told:
        """What is said of a repetition."""
        counters, manifest = done.counters, self._engine.store.manifest
        traffic = traffic_of(
            manifest, self.vocabulary, done.tokens, done.passes, counters, self._device
        )
        bound, lookups = bound_of(traffic, rates), max(1, counters.lookups)
        speed = done.tokens / done.seconds
        figures = Figures(
            speed,
            counters.hot / lookups,
            counters.warm / lookups,
            counters.cold / lookups,
            counters.read_bytes / done.tokens,
            traffic.bus / done.tokens,
            done.tokens / bound.seconds,
            bound.seconds / done.seconds,
        )
        return Told(figures, bound.by)


def usage_curve(engine: Engine, percents: Sequence[float]) -> list[float]:
    """The share of activations since loading that the top `percents` of each layer's experts take,
    mean over layers."""
    from tierrun.tiers.usage import top_shares

    rows = [top_shares(row.numpy(), tuple(percents)) for row in engine.hook.usage]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def forget_usage(engine: Engine) -> None:
    """Leave the store's usage file as it was: a benchmark's tokens are nobody's."""
    for row in engine.hook.usage:
        row.zero_()
