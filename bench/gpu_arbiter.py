"""A context that grows beside a full cache of experts: what changes hands, and what it costs.

    python -m tierrun.bench.gpu_arbiter STORE --card 16GiB --context 32768

A short context decodes; a long one grows to its end, prompt by prompt, each twice as long as the
one before, and decodes; a short one follows. After each, who has which memory, and what tierrun
says of it. It fails where the experts gave nothing, or did not regain what they gave.
"""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from tierrun.bench import devices
from tierrun.bench.devices import Setting, say
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.bench.stream import token_stream
from tierrun.engine.engine import Engine
from tierrun.engine.session import Session
from tierrun.io.errors import TierrunError
from tierrun.io.extent import format_bytes

SHORT = 1024

ROOM_LOG = "tierrun.engine.gpu.room"


class Stage(NamedTuple):
    """A part of the run: seconds of its prompt, and of each token decoded after it."""

    name: str
    tokens: int
    prompt_seconds: float
    seconds_per_token: float
    memory: dict[str, int]


class Heard(logging.Handler):
    """What tierrun says of memory that changes hands."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it, and show it at once."""
        self.lines.append(record.getMessage())
        say(self.lines[-1])


class Run:
    """One engine, one session, and the tokens that it is fed."""

    def __init__(self, engine: Engine, device: str, context: int, decoded: int) -> None:
        self._engine, self._device, self._decoded = engine, device, decoded
        vocabulary = engine.model.config.get_text_config().vocab_size
        period = token_stream(min(context, 4096), vocabulary)
        self._tokens = (period * -(-context // len(period)))[:context]
        self._session: Session = engine.session()

    def stage(self, name: str, length: int) -> Stage:
        """Extend the context to `length` tokens, the last of which are decoded."""
        begun, known = time.perf_counter(), len(self._session.tokens)
        self._session.prefill(self._tokens[known : length - self._decoded])
        devices.synchronise(self._device)
        prompted = time.perf_counter()
        for token in self._tokens[length - self._decoded : length]:
            self._session.prefill([token])
        decoded = (time.perf_counter() - prompted) / self._decoded
        self._engine.check_integrity()
        memory = devices.engine_memory(self._engine, self._device)
        say(f"{name}: {length} tokens, experts {format_bytes(memory['experts'])}")
        return Stage(name, length, prompted - begun, decoded, memory)

    def reset(self) -> None:
        """The next stage is a context of its own."""
        self._session.reset()


def run(engine: Engine, device: str, context: int, decoded: int) -> list[Stage]:
    """Short, long, short.

    Raises:
        AssertionError: the tiers' books disagree.
        TierrunError: an expert in VRAM is damaged.
    """
    it, short = Run(engine, device, context, decoded), min(SHORT, context // 2)
    stages = [it.stage("short", short)]
    length = short
    while length < context:
        length = min(2 * length, context)
        stages.append(it.stage("grows", length))
    it.reset()
    stages.append(it.stage("short again", short))
    devices.check_bytes(engine, device)
    return stages


def faults(stages: list[Stage]) -> list[str]:
    """Whether experts were given and regained."""
    experts = [stage.memory["experts"] for stage in stages]
    found = []
    if min(experts) == experts[0]:
        found.append("the experts gave nothing: ask for a smaller --card")
    if experts[-1] < experts[0]:
        found.append(
            f"the experts regained {format_bytes(experts[-1])} of {format_bytes(experts[0])}"
        )
    return found


def stage_table(stages: list[Stage], title: str) -> Table:
    """Who had which memory at the end of each stage."""
    names = [name for name in ("context", "experts", "vram_used") if name in stages[0].memory]
    table = Table(title=title)
    for name in ("", "tokens", "prompt, s", "ms per token", *names):
        table.add_column(name, justify="right" if name else "left")
    for stage in stages:
        sizes = [format_bytes(stage.memory[name]) for name in names]
        seconds = f"{stage.prompt_seconds:.2f}", f"{stage.seconds_per_token * 1000:.2f}"
        table.add_row(stage.name, str(stage.tokens), *seconds, *sizes)
    return table


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    device: devices.Device = "cuda",
    vram: devices.VramBudget = "auto",
    ram: devices.RamBudget = "110%experts",
    graphs: devices.Graphs = True,
    exact: devices.Exact = True,
    io: devices.Io = "auto",
    context: Annotated[int, typer.Option(min=4, help="Tokens of the long context.")] = 32768,
    decoded: Annotated[int, typer.Option(min=1, help="The last tokens of a stage.")] = 32,
    ubatch: devices.Ubatch = 2048,
    card: devices.Card = "16GiB",
    json_file: devices.JsonFile = None,
) -> None:
    """Grow a context beside a full cache of experts."""
    devices.check_device(device)
    ballast = devices.occupy(device, card)
    setting = Setting(device, vram, ram, "off", graphs, exact, context, ubatch, io)
    heard, log = Heard(), logging.getLogger(ROOM_LOG)
    log.addHandler(heard)
    log.setLevel(logging.DEBUG)
    try:
        with setting.load(store) as engine:
            say(f"loaded; filled in {devices.fill(engine, device):.1f} s")
            stages = run(engine, device, context, decoded)
    finally:
        log.removeHandler(heard)
        log.setLevel(logging.NOTSET)
    del ballast
    problems = faults(stages) if device != "cpu" else []
    open_console().print(
        stage_table(stages, f"{store.name}, {device}, card of {card or 'its own'}")
    )
    results: dict[str, Any] = {
        "setting": asdict(setting),
        "card": card,
        "stages": [stage._asdict() for stage in stages],
        "said": heard.lines,
        "faults": problems,
    }
    emit(document("gpu_arbiter", results), json_file)
    if problems:
        raise TierrunError("; ".join(problems))


if __name__ == "__main__":
    run_script(main)
