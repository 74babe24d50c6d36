"""Where a token's time goes on the CPU when all experts lie in RAM: kernels, and what is between.

    python -m tierrun.bench.token_profile STORE [--threads 2] [--out profile.json]

The whole store is read first. Then tokens are decoded by turns as they are, and with a clock around
every compiled call; what is not in one is *outside*: Python, torch's own operations, transformers.
Shown are medians over tokens, in milliseconds. In `--exact` there are no compiled calls.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import typer
from rich.table import Table

from tierrun.bench.model_bench import forget_usage
from tierrun.bench.report import document, emit, open_console, run_script, spread
from tierrun.bench.stream import routing_of, token_stream
from tierrun.engine.engine import Engine, load
from tierrun.engine.sampling import FixedTokens
from tierrun.engine.session import Session
from tierrun.io.store import read_manifest

_WARM_UP, _PROMPT = 16, 8
_ROOM = 256 << 20
"""Beyond the experts' bytes: slots do not fill what they are cut from."""
_START, _END = "start", "end"


class Call(NamedTuple):
    """A compiled call within a token; seconds of the clock."""

    name: str
    began: float
    ended: float


def calls() -> dict[str, tuple[ModuleType, str]]:
    """What a token's compiled calls are called, and where their callers find them."""
    from tierrun.engine.kernels import (
        prompt_rows,
        token_attention,
        token_experts,
        token_layer,
        token_products,
        token_router,
        token_run,
    )

    return {
        "layers": (token_run, "_through"),
        "layer, its experts": (token_layer, "finish_layer"),
        "attention": (token_attention, "attend"),
        "router": (token_router, "route"),
        "experts, begun": (token_experts, "begin_experts"),
        "experts": (token_experts, "finish_experts"),
        "linear": (token_products, "multiply"),
        "norm": (prompt_rows, "rms_norm"),
    }


@contextmanager
def clocked(log: list[Call]) -> Iterator[None]:
    """Every compiled call is put into `log` meanwhile."""
    with ExitStack() as stack:
        for name, (module, function) in calls().items():
            plain = vars(module)[function]
            stack.enter_context(patch.object(module, function, _clocked(name, plain, log)))
        yield


def _clocked(name: str, plain: Callable[..., Any], log: list[Call]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = plain(*arguments)
        log.append(Call(name, began, time.perf_counter()))
        return found

    return call


def parts(found: list[Call], began: float, ended: float) -> dict[str, float]:
    """Seconds by compiled call, and by what two of them have between them (`a → b`)."""
    seconds: dict[str, float] = defaultdict(float)
    last = Call(_START, began, began)
    for call in (*found, Call(_END, ended, ended)):
        seconds[f"{last.name} → {call.name}"] += call.began - last.ended
        if call.name != _END:
            seconds[call.name] += call.ended - call.began
        last = call
    return dict(seconds)


def read_all(engine: Engine) -> None:
    """Read every expert, so that nothing is left to read; the budget must hold them."""
    for layer, kind in enumerate(engine.store.manifest.layers):
        for _ in engine.residency.stream(layer, range(len(kind.records)), len(kind.records)):
            pass


class Tokens(NamedTuple):
    """Seconds of tokens as they are; of those with clocks, and their parts."""

    plain: list[float]
    clocked: list[float]
    parts: list[dict[str, float]]


def decode(session: Session, stream: list[int], count: int) -> Tokens:
    """`count` tokens of each kind, by turns, after some of the stream."""
    chooser, found = FixedTokens(stream[_PROMPT + 1 :]), Tokens([], [], [])
    session.prefill(stream[:_PROMPT])
    token = stream[_PROMPT]
    for number in range(_WARM_UP + 2 * count):
        log: list[Call] = []
        with ExitStack() as stack:
            if number % 2:
                stack.enter_context(clocked(log))
            began = time.perf_counter()
            token, _ = session.step(token, chooser)
            ended = time.perf_counter()
        if number < _WARM_UP:
            continue
        if number % 2:
            found.clocked.append(ended - began)
            found.parts.append(parts(log, began, ended))
        else:
            found.plain.append(ended - began)
    return found


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each part over all tokens, 0 where a token has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}


def outside(row: dict[str, float]) -> float:
    """Seconds of a token in no compiled call."""
    return sum(seconds for name, seconds in row.items() if " → " in name)


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    tokens: Annotated[int, typer.Option(help="Measured, of each kind.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
) -> None:
    """Measure what of a token's time is kernels, and what is between them."""
    ram = str(read_manifest(store).expert_bytes + _ROOM)
    with load(store, device="cpu", ram=ram, threads=threads) as engine:
        read_all(engine)
        config = engine.model.config
        vocabulary: int = config.get_text_config().vocab_size
        count = _PROMPT + _WARM_UP + 2 * tokens + 2
        stream = token_stream(count, vocabulary, routing=routing_of(config))
        cold = engine.ledger.snapshot().cold
        found = decode(engine.session(), stream, tokens)
        assert engine.ledger.snapshot().cold == cold, "something was read"
        forget_usage(engine)
    shares = [outside(row) / sum(row.values()) for row in found.parts]
    typical = medians(found.parts)
    open_console().print(_table(found, typical, shares))
    results = {
        "threads": threads,
        "tokens": tokens,
        "seconds": spread(found.plain)._asdict(),
        "clocked_seconds": spread(found.clocked)._asdict(),
        "outside_seconds": spread([outside(row) for row in found.parts])._asdict(),
        "outside_share": spread(shares)._asdict(),
        "parts": typical,
    }
    emit(document("token_profile", results), out)


def _table(found: Tokens, typical: dict[str, float], shares: list[float]) -> Table:
    median = statistics.median
    title = (
        f"{median(found.plain) * 1e3:.1f} ms a token ({1 / median(found.plain):.1f} tok/s), with "
        f"clocks {median(found.clocked) * 1e3:.1f}; outside of kernels {median(shares):.1%}"
    )
    table = Table("part", "ms", title=title)
    for name, seconds in sorted(typical.items(), key=lambda item: (" → " in item[0], -item[1])):
        table.add_row(name, f"{seconds * 1e3:.3f}")
    return table


if __name__ == "__main__":
    run_script(main)
