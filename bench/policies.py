"""What replacement policies would have kept: routing recorded from a store, replayed against each.

    python -m tierrun.bench.policies STORE [--text FILE] [--shares 0.12,0.22] [--out policies.json]

Tokens are those of a text, or a synthetic stream. Every budget is a share of all experts, in slots
of one size; each miss is admitted, as decode does. *belady* knows the future and evicts what is
used last: no policy can do better. Hits are counted after a tenth of the tokens.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple
from unittest.mock import patch

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from tierrun.bench.model_bench import forget_usage
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.bench.stream import routing_of, token_stream
from tierrun.bench.synthetic_models import Routing
from tierrun.engine.engine import Engine, load
from tierrun.engine.sampling import FixedTokens
from tierrun.engine.text import encode
from tierrun.io.store import read_manifest
from tierrun.tiers.policy import POLICIES, Experts, make_policy

BELADY = "belady"
_PROMPT, _ROOM = 8, 256 << 20
_NEVER = np.iinfo(np.int64).max

Step = list[int]
"""The experts that a token used, over all layers, in their order."""


def record(engine: Engine, tokens: list[int]) -> list[Step]:
    """What `tokens` after the first few used."""
    policy, found = engine.residency.placement.policy, list[tuple[int, list[int]]]()
    plain = policy.used

    def used(experts: Experts, step: int) -> None:
        found.append((step, experts.tolist()))
        plain(experts, step)

    with patch.object(policy, "used", used):
        session = engine.session()
        session.prefill(tokens[:_PROMPT])
        found.clear()
        chooser = FixedTokens(tokens[_PROMPT + 1 :])
        for token in tokens[_PROMPT:-1]:
            session.step(token, chooser)
    steps: dict[int, Step] = {}
    for step, experts in found:
        steps.setdefault(step, []).extend(experts)
    return list(steps.values())


def replay(
    steps: list[Step], slots: int, worth: Callable[[Experts, int], NDArray[np.generic]],
    used: Callable[[Experts, int], None],
) -> float:  # fmt: skip
    """The share of hits with `slots`, where what is worth least goes."""
    held: set[int] = set()
    hits = lookups = 0
    for number, step in enumerate(steps):
        used(np.array(step, np.int64), number)
        counts = number >= len(steps) // 10
        for expert in step:
            lookups += counts
            if expert in held:
                hits += counts
                continue
            if len(held) == slots:
                candidates = np.fromiter(held, np.int64, slots)
                held.remove(int(candidates[np.argmin(worth(candidates, number))]))
            held.add(expert)
    return hits / lookups


class Oracle:
    """Evicts what is used again last."""

    def __init__(self, steps: list[Step], num_experts: int) -> None:
        self._uses: list[list[int]] = [[] for _ in range(num_experts)]
        for number in reversed(range(len(steps))):
            for expert in steps[number]:
                self._uses[expert].append(number)

    def used(self, experts: Experts, step: int) -> None:
        """Uses up to `step` are over."""
        for expert in experts.tolist():
            while self._uses[expert] and self._uses[expert][-1] <= step:
                self._uses[expert].pop()

    def worth(self, experts: Experts, step: int) -> NDArray[np.generic]:
        """The sooner the more."""
        following = (self._uses[expert] for expert in experts.tolist())
        return -np.array([uses[-1] if uses else _NEVER for uses in following])


class Row(NamedTuple):
    """Shares of hits by policy, with slots for `share` of the experts."""

    share: float
    hits: dict[str, float]


def compare(steps: list[Step], num_experts: int, shares: list[float]) -> Iterator[Row]:
    """Every policy but the split by layers, and the oracle."""
    for share in shares:
        slots, hits = max(1, int(share * num_experts)), {}
        for name in POLICIES:
            if name != "layers":
                policy = make_policy(name, num_experts)
                hits[name] = replay(steps, slots, policy.worth, policy.used)
        lookups = [[expert] for step in steps for expert in step]  # it knows their order, too
        oracle = Oracle(lookups, num_experts)
        hits[BELADY] = replay(lookups, slots, oracle.worth, oracle.used)
        yield Row(share, hits)


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    text: Annotated[Path | None, typer.Option(help="Whose tokens to use.")] = None,
    routing: Annotated[
        Routing | None, typer.Option(help="Of the stream. Default: the store's.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Recorded.")] = 1000,
    shares: Annotated[str, typer.Option(help="Of the experts, that there are slots for.")] = (
        "0.12,0.22,0.4"
    ),
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
) -> None:
    """Record a stream's routing and replay it against every policy."""
    ram = str(2 * read_manifest(store).expert_bytes + _ROOM)
    with load(store, device="cpu", ram=ram, context=tokens + _PROMPT + 1) as engine:
        steps = record(engine, _tokens(engine, text, routing, tokens + _PROMPT + 1))
        forget_usage(engine)
        num_experts = sum(len(layer.records) for layer in engine.store.manifest.layers)
    rows = list(compare(steps, num_experts, [float(share) for share in shares.split(",")]))
    table = Table("slots for", *rows[0].hits, title=f"hits of {len(steps)} tokens, %")
    for row in rows:
        table.add_row(f"{row.share:.0%}", *(f"{100 * hits:.1f}" for hits in row.hits.values()))
    open_console().print(table)
    results = {
        "tokens": len(steps),
        "experts": num_experts,
        "text": None if text is None else text.name,
        "routing": None if routing is None else str(routing),
        "rows": [row._asdict() for row in rows],
    }
    emit(document("policies", results), out)


def _tokens(engine: Engine, text: Path | None, routing: Routing | None, count: int) -> list[int]:
    config = engine.model.config
    if text is None:
        vocabulary: int = config.get_text_config().vocab_size
        return token_stream(count, vocabulary, routing=routing or routing_of(config))
    return encode(engine.tokenizer, text.read_text())[:count]


if __name__ == "__main__":
    run_script(main)
