"""What the last run of a store cost, in a small file beside its usage counts.

`tierrun plan --check` holds its prediction against it.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tierrun.engine.engine import Engine
from tierrun.io.errors import UsageError
from tierrun.io.store import Store
from tierrun.io.whole import write_whole
from tierrun.tiers.usage import UsageFile
from tierrun.tools.report import Answer

log = logging.getLogger(__name__)

_LEAST_TOKENS = 8
"""A run of fewer says little."""


@dataclass(frozen=True, slots=True)
class LastRun:
    """Decode of one answer: `seconds` of `tokens` after the first, their lookups by tier, bytes
    read; and with what. `fingerprint` is the store's."""

    fingerprint: str
    when: str
    device: str
    hot_bytes: int
    warm_bytes: int
    context: int
    prompt_tokens: int
    prompt_seconds: float
    tokens: int
    seconds: float
    hot: int
    warm: int
    cold: int
    read_bytes: int


def remember(engine: Engine, answer: Answer) -> None:
    """Keep what `answer` cost; a failure is logged, never raised into a generation."""
    steps = answer.tokens[1:]
    if len(steps) < _LEAST_TOKENS:
        return
    stats, counters = engine.stats(), [token.figures.counters for token in steps]
    run = LastRun(
        fingerprint=engine.store.manifest.fingerprint,
        when=time.strftime("%Y-%m-%d %H:%M:%S"),
        device=engine.device.type,
        hot_bytes=stats.hot_bytes,
        warm_bytes=stats.warm_bytes,
        context=answer.prompt_tokens + len(answer.tokens),
        prompt_tokens=answer.prompt_tokens,
        prompt_seconds=answer.tokens[0].figures.seconds,
        tokens=len(steps),
        seconds=sum(token.figures.seconds for token in steps),
        hot=sum(c.hot for c in counters),
        warm=sum(c.warm for c in counters),
        cold=sum(c.cold for c in counters),
        read_bytes=sum(c.read_bytes for c in counters),
    )
    path = _path(engine.store)
    try:
        write_whole(path, json.dumps(asdict(run), indent=1) + "\n")
    except OSError as error:
        log.warning("the run's figures not saved to %s: %s", path, error.strerror)


def recall(store: Store) -> LastRun:
    """The last run of `store`.

    Raises:
        UsageError: there is none, or its record cannot be used.
    """
    from pydantic import TypeAdapter  # is not needed to run a model

    path, advice = _path(store), "run it once: tierrun run … -n 64"
    try:
        run = TypeAdapter(LastRun).validate_json(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"--check: {store.roots[0]} has no record of a run; {advice}") from None
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"--check: {path} cannot be used ({why}); {advice}") from None
    if run.tokens < _LEAST_TOKENS or run.seconds <= 0:
        raise UsageError(f"--check: {path} is of a run that says nothing; {advice}")
    if run.fingerprint != store.manifest.fingerprint:
        raise UsageError(f"--check: {path} is of another model; {advice}")
    return run


def _path(store: Store) -> Path:
    return UsageFile(store.roots[0], store.manifest).path.with_suffix(".run.json")
