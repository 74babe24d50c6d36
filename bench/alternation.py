"""Long and short contexts in turn, each of another domain: memory must come back every time.

A domain is a stream of tokens with a vocabulary of its own. A turn is one context: a prompt of its
domain, then decoded tokens, with the books checked after each. Turns with contexts of one length
are compared with each other; the first few of each may take memory.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table

from tierrun.bench import devices
from tierrun.bench.devices import say
from tierrun.bench.stream import token_stream
from tierrun.engine.engine import Engine
from tierrun.io.errors import UsageError
from tierrun.io.extent import format_bytes

JUDGED = ("rss_anonymous", "pinned", "vram_used_rest", "vram_allocated_rest")
"""Memory that must not grow. `rest` is without the experts: these have a budget."""

SETTLING = 2
"""Turns of each length that may take memory."""

MANY = 5
"""Turns of a length, in a quarter of all, from which on quarters are compared."""

_PERIOD = 4096
"""Tokens after which a domain begins anew: making them takes longer than prefilling them."""


@dataclass(frozen=True, slots=True)
class Alternation:
    """Contexts of these lengths in turn, `answer` tokens of each decoded."""

    contexts: tuple[int, ...]
    domains: int
    answer: int
    seconds: float

    @staticmethod
    def of(contexts: str, domains: int, answer: int, seconds: float) -> "Alternation":
        """Of `2048,32768`.

        Raises:
            UsageError: not lengths, or no room for the answer.
        """
        try:
            lengths = tuple(int(text) for text in contexts.split(","))
        except ValueError:
            raise UsageError(f"--contexts {contexts}: write lengths, such as 2048,32768") from None
        if min(lengths) <= answer:
            raise UsageError(f"--contexts {contexts}: each must be more than {answer} of --answer")
        return Alternation(lengths, domains, answer, seconds)


class Turn(NamedTuple):
    """One context and what memory was taken at its end."""

    context: int
    domain: int
    seconds: float
    memory: dict[str, int]


def domain_stream(count: int, vocabulary: int, domain: int, domains: int) -> list[int]:
    """`count` token ids, none of which another domain has."""
    period = token_stream(min(count, _PERIOD), vocabulary // domains, seed=domain)
    tokens = [token * domains + domain for token in period]
    return (tokens * -(-count // len(tokens)))[:count]


def alternate(
    engine: Engine, device: str, plan: Alternation, started: float
) -> tuple[list[Turn], int]:
    """Turn after turn until time is over; and how often the books were checked.

    Raises:
        AssertionError: the tiers' books disagree.
    """
    session, turns, checks = engine.session(), list[Turn](), 0
    vocabulary = engine.model.config.get_text_config().vocab_size
    count = max(plan.contexts)
    streams = [domain_stream(count, vocabulary, d, plan.domains) for d in range(plan.domains)]
    while not turns or time.perf_counter() - started < plan.seconds:
        length = plan.contexts[len(turns) % len(plan.contexts)]
        domain = len(turns) % plan.domains
        begun = time.perf_counter()
        session.reset()
        tokens = streams[domain][:length]
        prompt, fixed = tokens[: length - plan.answer], tokens[length - plan.answer :]
        records = engine.generate(prompt, len(fixed), fixed=fixed, ignore_eos=True, session=session)
        for _ in records:
            engine.check_integrity()
            checks += 1
        turns.append(_turn(engine, device, length, domain, time.perf_counter() - begun))
    return turns, checks


def _turn(engine: Engine, device: str, length: int, domain: int, seconds: float) -> Turn:
    memory = devices.engine_memory(engine, device)
    sizes = ", ".join(f"{name} {format_bytes(value)}" for name, value in memory.items())
    say(f"context of {length}, domain {domain}, {seconds:.1f} s: {sizes}")
    return Turn(length, domain, seconds, memory)


def growth(turns: Sequence[Turn], context: int) -> dict[str, int]:
    """Bytes by which later turns with this length exceed the first few of them.

    The worst of few. Of many, the median of the last quarter against that of the first: what an
    allocator holds back differs from turn to turn, what leaks adds up.
    """
    memory = [turn.memory for turn in turns if turn.context == context]
    settling, later = memory[:SETTLING], memory[SETTLING:]
    names, quarter = memory[0] if later else (), len(later) // 4
    if quarter >= MANY:
        return {
            name: int(_median(later[-quarter:], name) - _median(later[:quarter], name))
            for name in names
        }
    return {
        name: max(row[name] for row in later) - max(row[name] for row in settling) for name in names
    }


def _median(memory: Sequence[dict[str, int]], name: str) -> float:
    return statistics.median(row[name] for row in memory)


def faults(turns: Sequence[Turn], contexts: Sequence[int], limit: int) -> list[str]:
    """What grew, in words; too few turns to tell are a fault as well."""
    return [
        text for context in dict.fromkeys(contexts) for text in _faults_of(turns, context, limit)
    ]


def _faults_of(turns: Sequence[Turn], context: int, limit: int) -> list[str]:
    if sum(turn.context == context for turn in turns) <= SETTLING:
        return [f"too few contexts of {context} tokens to see growth; give it more --seconds"]
    grown = growth(turns, context)
    return [
        f"{name} grew by {format_bytes(grown[name])} from one context of {context} to another"
        for name in JUDGED
        if grown.get(name, 0) > limit
    ]


def table(turns: Sequence[Turn], title: str) -> Table:
    """Every turn: who had which memory."""
    names = list(turns[0].memory)
    made = Table(title=title)
    for name in ("context", "domain", "seconds", *names):
        made.add_column(name, justify="right")
    for turn in turns:
        sizes = [format_bytes(turn.memory[name]) for name in names]
        made.add_row(str(turn.context), str(turn.domain), f"{turn.seconds:.1f}", *sizes)
    return made


def figures(turns: Sequence[Turn], contexts: Sequence[int]) -> dict[str, Any]:
    """For the JSON document."""
    return {
        "turns": [turn._asdict() for turn in turns],
        "growth": {context: growth(turns, context) for context in dict.fromkeys(contexts)},
    }
