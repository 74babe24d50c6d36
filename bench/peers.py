"""tierrun against accelerate's disk offload: the same checkpoint, tokens, memory cgroup and drive.

    python -m tierrun.bench.peers SYNTHETIC

Every arm is a fresh process in a memory cgroup of its own, from a cold page cache. accelerate gets
`device_map="auto"` with the budget as `max_memory`, and, as a second arm, a device map made by hand
that leaves only the experts on disk; both with `batched_mm` experts, the fastest of transformers'
implementations here. Load time is not counted. All arms decode the same stream at the same
positions, accelerate fewer tokens of it, because it is slow. Where accelerate does not survive in
the cgroup, the cgroup grows for all arms, and that is said.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from tierrun.bench.cgroup import drop_caches, memory_cgroup
from tierrun.bench.decode import DecodeRun
from tierrun.bench.offloaded import Map, OffloadedRun
from tierrun.bench.report import Spread, document, emit, open_console, run_script, spread
from tierrun.io.errors import TierrunError, UsageError
from tierrun.io.extent import format_bytes, parse_bytes

AIM = 5.0
"""Times the tokens per second of the faster accelerate arm."""

_GROWTH = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Sizes of the cgroup to try, in multiples of the first."""


class Setting(NamedTuple):
    """What all arms share; `memory` in bytes."""

    directory: Path
    memory: int
    ram: str
    warmup: int
    tokens: int
    peer_tokens: int


class Result(NamedTuple):
    """One run of one arm."""

    tokens_per_second: float
    read_bytes: float
    peak_rss: int
    load_seconds: float


def run_inside(memory: int, arguments: Sequence[str]) -> str | None:
    """The last line that `python -m arguments` printed in a cgroup; None if it was killed.

    Raises:
        TierrunError: it failed in any other way.
    """
    drop_caches()
    with memory_cgroup(memory) as cgroup:
        command = cgroup.command([sys.executable, "-m", *arguments])
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        killed = cgroup.usage().killed
    if run.returncode == 0:
        return run.stdout.strip().splitlines()[-1]
    if killed or run.returncode == -9:
        return None
    raise TierrunError(f"{arguments[0]} ended with {run.returncode}")


def run_tierrun(setting: Setting) -> Result:
    """One run of ours."""
    numbers = ["--warmup", str(setting.warmup), "--tokens", str(setting.tokens)]
    store = str(setting.directory / "store")
    line = run_inside(
        setting.memory, ["tierrun.bench.decode", store, "--ram", setting.ram, *numbers]
    )
    if line is None:
        raise TierrunError(f"tierrun was killed in {format_bytes(setting.memory)}")
    run = DecodeRun.from_json(line)
    reads = run.counters.read_bytes / len(run.seconds)
    return Result(run.tokens_per_second, reads, run.peak_rss, run.load_seconds)


def run_accelerate(setting: Setting, map_: Map) -> Result | None:
    """One run of accelerate's; None if it was killed for want of memory."""
    offload = Path(tempfile.mkdtemp(prefix="offload-", dir=setting.directory))
    numbers = ["--warmup", str(setting.warmup), "--tokens", str(setting.peer_tokens)]
    checkpoint = str(setting.directory / "checkpoint")
    options = ["--map", map_.value, "--ram", setting.ram, *numbers]
    try:
        line = run_inside(
            setting.memory, ["tierrun.bench.offloaded", checkpoint, str(offload), *options]
        )
    finally:
        shutil.rmtree(offload)
    if line is None:
        return None
    run = OffloadedRun.from_json(line)
    return Result(run.tokens_per_second, run.read_bytes, run.peak_rss, run.load_seconds)


def find_memory(setting: Setting, console: Console) -> tuple[Setting, Result]:
    """The smallest cgroup in which accelerate's own device map runs, and its first result there.

    Raises:
        TierrunError: it runs in none of them.
    """
    for growth in _GROWTH:
        grown = setting._replace(memory=int(setting.memory * growth))
        result = run_accelerate(grown, Map.AUTO)
        if result is not None:
            return grown, result
        console.print(f"accelerate was killed in {format_bytes(grown.memory)}; all arms get more")
    raise TierrunError(f"accelerate was killed even in {format_bytes(grown.memory)}")


def measure(
    setting: Setting, rounds: int, console: Console
) -> tuple[Setting, dict[str, list[Result]]]:
    """`rounds` rounds of all arms, alternating."""
    setting, first = find_memory(setting, console)
    arms: dict[str, list[Result]] = {"accelerate, auto": [first]}
    for number in range(rounds):
        if number:
            _add(arms, "accelerate, auto", run_accelerate(setting, Map.AUTO), console)
        _add(arms, "tierrun", run_tierrun(setting), console)
        _add(arms, "accelerate, experts", run_accelerate(setting, Map.EXPERTS), console)
    return setting, arms


def _add(arms: dict[str, list[Result]], name: str, result: Result | None, console: Console) -> None:
    if result is None:
        console.print(f"{name}: killed for want of memory")
        return
    arms.setdefault(name, []).append(result)
    console.print(f"{name}: {result.tokens_per_second:.2f} tok/s")


def _spreads(results: list[Result]) -> dict[str, Spread]:
    return {name: spread([getattr(r, name) for r in results]) for name in Result._fields}


def _table(setting: Setting, arms: dict[str, dict[str, Spread]]) -> Table:
    table = Table(
        title=f"cgroup of {format_bytes(setting.memory)}, budget {setting.ram}; "
        "median (least–largest)"
    )
    table.add_column("")
    for name in ("tok/s", "GB read per token", "peak RSS, MiB", "load, s"):
        table.add_column(name, justify="right")
    for name, arm in arms.items():
        table.add_row(
            name,
            arm["tokens_per_second"].text(),
            arm["read_bytes"].text(scale=1e-9),
            arm["peak_rss"].text(0, scale=2**-20),
            arm["load_seconds"].text(1),
        )
    return table


def main(
    directory: Annotated[Path, typer.Argument(help="From tierrun.bench.synthetic.")],
    memory: Annotated[str, typer.Option(help="Limit of the cgroup.")] = "2GiB",
    ram: Annotated[str, typer.Option(help="Budget for experts; max_memory.")] = "1GiB",
    warmup: Annotated[int, typer.Option(help="Tokens before the measured ones.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens measured of tierrun.")] = 32,
    peer_tokens: Annotated[int, typer.Option(help="Tokens measured of accelerate.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Of all arms.")] = 2,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the JSON document here.")
    ] = None,
) -> None:
    """Compare tokens per second with accelerate's disk offload."""
    for part in ("checkpoint", "store"):
        if not (directory / part).is_dir():
            raise UsageError(f"{directory} has no {part}; make it with tierrun.bench.synthetic")
    console = open_console()
    asked = Setting(directory, parse_bytes(memory), ram, warmup, tokens, peer_tokens)
    setting, results = measure(asked, rounds, console)
    arms = {name: _spreads(runs) for name, runs in results.items()}
    console.print(_table(setting, arms))
    rates = {name: arm["tokens_per_second"].median for name, arm in arms.items()}
    ours = rates.pop("tierrun")
    ratios = {name: ours / rate for name, rate in rates.items()}
    for name, ratio in ratios.items():
        console.print(f"tierrun / {name}: [bold]{ratio:.1f}[/bold]")
    document_ = {
        "memory_bytes": setting.memory,
        "ram": ram,
        "arms": {
            name: {figure: value._asdict() for figure, value in arm.items()}
            for name, arm in arms.items()
        },
        "ratios": ratios,
        "verdict": {"fast_enough": min(ratios.values()) >= AIM},
    }
    results_json: dict[str, Any] = document("peers", document_)
    emit(results_json, json_file)


if __name__ == "__main__":
    run_script(main)
