"""A long decode with little VRAM: books checked after every token, memory that must not grow.

    python -m tierrun.bench.gpu_soak STORE --vram 2%experts --tokens 2000
    python -m tierrun.bench.gpu_soak STORE --card 16GiB --vram auto --contexts 2048,32768

Logits of two short prompts, taken before and after, must be the same bits: an expert damaged on its
way through the tiers would show there. Memory is compared with what it was after the first tokens;
with --contexts, long and short contexts in turn, with that of contexts as long (`alternation`).
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table

from tierrun.bench import alternation, devices
from tierrun.bench.alternation import Alternation
from tierrun.bench.devices import Setting, say
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.bench.stream import token_stream
from tierrun.engine.engine import Engine
from tierrun.io.errors import TierrunError
from tierrun.io.extent import format_bytes, parse_bytes
from tierrun.tiers.ledger import Counters

PROBES = (6, 24)
"""Tokens of the prompts whose logits are compared: one is computed like decode, one is streamed."""

JUDGED = ("rss_anonymous", "vram_used", "vram_allocated", "vram_reserved")
"""Memory that must not grow; mapped files, which the rest of the RSS is, may."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Tokens to decode, of which the first `settle` may take memory; a look every `every`."""

    prompt: int = 64
    tokens: int = 2000
    settle: int = 200
    every: int = 100
    seconds: float = 540.0

    @property
    def context(self) -> int:
        return max(self.prompt + self.tokens + 2, *PROBES)


class Look(NamedTuple):
    """What was seen after so many tokens; counters since the start."""

    tokens: int
    seconds: float
    memory: dict[str, int]
    counters: Counters


@dataclass(frozen=True, slots=True)
class Soak:
    """The looks, the first of them when memory had settled, and what the probes said."""

    looks: list[Look]
    checks: int
    logits_error: float

    def growth(self) -> dict[str, int]:
        """Bytes more than when memory had settled, at the worst of the later looks."""
        first, later = self.looks[0].memory, self.looks[1:] or self.looks
        return {name: max(look.memory[name] for look in later) - first[name] for name in first}


def soak(engine: Engine, device: str, plan: Plan, started: float) -> Soak:
    """Decode, checking the books after every token.

    Raises:
        AssertionError: the tiers' books disagree.
    """
    before = probe(engine)
    looks, checks, measured = list[Look](), 0, 0.0
    vocabulary = engine.model.config.get_text_config().vocab_size
    stream = token_stream(plan.prompt + plan.tokens + 1, vocabulary)
    prompt, fixed = stream[: plan.prompt], stream[plan.prompt :]
    records = engine.generate(prompt, len(fixed), fixed=fixed, ignore_eos=True)
    for number, record in enumerate(records):
        measured += record.figures.seconds
        engine.check_integrity()
        checks += 1
        late = time.perf_counter() - started > plan.seconds
        if number >= plan.settle and (number % plan.every == 0 or late):
            looks.append(_look(engine, device, number, measured))
        if late:
            say(f"out of time after {number} tokens")
            break
    if not looks or looks[-1].tokens < number:
        looks.append(_look(engine, device, number, measured))
    devices.check_bytes(engine, device)
    return Soak(looks, checks, _error(before, probe(engine)))


def probe(engine: Engine) -> torch.Tensor:
    """Logits of a few tokens, by both ways of computing."""
    vocabulary = engine.model.config.get_text_config().vocab_size
    tokens = token_stream(max(PROBES), vocabulary, seed=1)
    return torch.cat([engine.logits(tokens[:count]) for count in PROBES])


def _error(before: torch.Tensor, after: torch.Tensor) -> float:
    """0 where all bits are the same."""
    return 0.0 if torch.equal(before, after) else float((after - before).norm() / before.norm())


def _look(engine: Engine, device: str, tokens: int, seconds: float) -> Look:
    devices.synchronise(device)
    look = Look(tokens, seconds, devices.memory_figures(device), engine.ledger.snapshot())
    sizes = ", ".join(f"{name} {format_bytes(value)}" for name, value in look.memory.items())
    share = look.counters.hot / max(1, look.counters.lookups)
    say(f"{tokens} tokens, {tokens / seconds:.1f} tok/s, {share:.1%} from VRAM, {sizes}")
    return look


def soak_table(done: Soak, title: str) -> Table:
    """Memory when it had settled, at the end, and its growth."""
    table = Table(title=title)
    for name in ("", f"after {done.looks[0].tokens} tokens", f"{done.looks[-1].tokens}", "growth"):
        table.add_column(name, justify="right" if name else "left")
    growth = done.growth()
    for name, first in done.looks[0].memory.items():
        sizes = (first, done.looks[-1].memory[name], growth[name])
        table.add_row(name, *map(format_bytes, sizes))
    table.add_row("tokens per second", "", f"{done.looks[-1].tokens / done.looks[-1].seconds:.1f}")
    table.add_row("books checked", "", str(done.checks))
    table.add_row("error of the logits", "", f"{done.logits_error:.3g}")
    return table


def faults(done: Soak, limit: int, exact: bool) -> list[str]:
    """What is wrong, in words."""
    growth = done.growth()
    found = [
        f"{name} grew by {format_bytes(growth[name])}"
        for name in JUDGED
        if growth.get(name, 0) > limit
    ]
    return found + _changed(done.logits_error, exact)


def _changed(error: float, exact: bool) -> list[str]:
    changed = error > (0.0 if exact else 1e-2)
    return [f"the logits changed by {error:.3g}"] if changed else []


def figures(done: Soak, problems: Sequence[str]) -> dict[str, Any]:
    """For the JSON document."""
    looks = [look._asdict() | {"counters": asdict(look.counters)} for look in done.looks]
    return {
        "looks": looks,
        "growth": done.growth(),
        "integrity_checks": done.checks,
        "logits_error": done.logits_error,
        "faults": list(problems),
    }


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    device: devices.Device = "cuda",
    vram: devices.VramBudget = "2%experts",
    ram: devices.RamBudget = "auto",
    compile_: devices.Compile = "off",
    graphs: devices.Graphs = True,
    exact: devices.Exact = True,
    io: devices.Io = "auto",
    threads: devices.Threads = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Decoded.")] = 2000,
    settle: Annotated[int, typer.Option(help="Tokens after which memory must not grow.")] = 200,
    every: Annotated[int, typer.Option(min=1, help="Tokens between looks at the memory.")] = 100,
    seconds: Annotated[float, typer.Option(help="Ends early after so long.")] = 540.0,
    limit: Annotated[str, typer.Option(help="Growth that is let pass.")] = "32MiB",
    contexts: Annotated[str, typer.Option(help="Lengths in turn, until --seconds.")] = "",
    domains: Annotated[int, typer.Option(min=1, help="Vocabularies in turn.")] = 3,
    answer: Annotated[int, typer.Option(min=1, help="Tokens decoded in each context.")] = 64,
    ubatch: devices.Ubatch = 0,
    card: devices.Card = "",
    json_file: devices.JsonFile = None,
) -> None:
    """Decode for long with little VRAM, checking books and memory."""
    started = time.perf_counter()
    devices.check_device(device)
    ballast = devices.occupy(device, card)
    setting = Setting(
        device, vram, ram, compile_, graphs, exact, ubatch=ubatch, io=io, threads=threads
    )
    if contexts:
        turns = Alternation.of(contexts, domains, answer, seconds)
        results = alternating(store, setting, turns, parse_bytes(limit), started)
    else:
        plan = Plan(tokens=tokens, settle=min(settle, tokens), every=every, seconds=seconds)
        results = decoding(store, setting, plan, parse_bytes(limit), started)
    del ballast
    emit(document("gpu_soak", results), json_file)
    if results["faults"]:
        raise TierrunError("; ".join(results["faults"]))


def decoding(
    store: Path, setting: Setting, plan: Plan, limit: int, started: float
) -> dict[str, Any]:
    """One context, decoded for long."""
    setting = replace(setting, context=plan.context)
    with setting.load(store) as engine:
        say("loaded")
        done = soak(engine, setting.device, plan, started)
    problems = faults(done, limit, setting.exact or setting.device == "cpu")
    open_console().print(soak_table(done, f"{store.name}, {setting.device}, VRAM {setting.vram}"))
    return {"setting": asdict(setting), "plan": asdict(plan), **figures(done, problems)}


def alternating(
    store: Path, setting: Setting, plan: Alternation, limit: int, started: float
) -> dict[str, Any]:
    """Long and short contexts of several domains."""
    setting = replace(setting, context=max(*plan.contexts, *PROBES))
    with setting.load(store) as engine:
        say("loaded")
        before = probe(engine)
        turns, checks = alternation.alternate(engine, setting.device, plan, started)
        devices.check_bytes(engine, setting.device)
        error = _error(before, probe(engine))
    problems = alternation.faults(turns, plan.contexts, limit)
    problems += _changed(error, setting.exact or setting.device == "cpu")
    title = f"{store.name}, {setting.device}, VRAM {setting.vram}"
    open_console().print(alternation.table(turns, title))
    return {
        "setting": asdict(setting),
        "plan": asdict(plan),
        **alternation.figures(turns, plan.contexts),
        "integrity_checks": checks,
        "logits_error": error,
        "faults": problems,
    }


if __name__ == "__main__":
    run_script(main)
