"""A model larger than memory: 6.2 GiB of experts decoded inside a memory cgroup of 2 GiB, page
cache included, with a budget of 1 GiB; and how far that is from what the drive allows.

    python -m tierrun.bench.larger_than_memory SYNTHETIC/store

Needs root (cgroups, page cache) and fio. Every run is a fresh process that starts with a cold page
cache, decodes 8 + 32 tokens for the cache to learn, then 32 measured ones of a fixed stream. Runs
with and without look-ahead alternate; fio measures the drive before and after each of them, with
the record's size and the mean number of records in flight of the last run.

The *bound without foresight* is the sum over layers of [resident compute + max(that layer's reads
at fio's bandwidth, its hits' compute)]; the *bound with foresight* is the larger of all reads
and all compute.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tierrun.bench import fio
from tierrun.bench.cgroup import CgroupUsage, drop_caches, memory_cgroup
from tierrun.bench.decode import DecodeRun
from tierrun.bench.report import Spread, document, emit, open_console, run_script
from tierrun.bench.rounds import ROWS, Round, spreads
from tierrun.io.errors import TierrunError
from tierrun.io.extent import format_bytes, parse_bytes
from tierrun.io.store import Store

AIM = 1.25
"""Time per token over the bound without foresight: no more than this."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of one benchmark share."""

    store: Path
    memory: str
    ram: str
    warmup: int
    tokens: int
    threads: int

    def command(self, lookahead: bool) -> list[str]:
        flag = "--lookahead" if lookahead else "--no-lookahead"
        numbers = {"warmup": self.warmup, "tokens": self.tokens, "threads": self.threads}
        options = [word for name, n in numbers.items() for word in (f"--{name}", str(n))]
        module = [sys.executable, "-m", "tierrun.bench.decode"]
        return [*module, str(self.store), "--ram", self.ram, flag, *options]


def run_once(setting: Setting, lookahead: bool) -> tuple[DecodeRun, CgroupUsage]:
    """One run in a cgroup of its own, from a cold page cache.

    Raises:
        TierrunError: the run failed, or was killed for want of memory.
    """
    drop_caches()
    with memory_cgroup(parse_bytes(setting.memory)) as cgroup:
        command = cgroup.command(setting.command(lookahead))
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        usage = cgroup.usage()
    if run.returncode != 0:
        raise TierrunError(f"the run in {setting.memory} ended with {run.returncode}: {usage}")
    return DecodeRun.from_json(run.stdout.strip().splitlines()[-1]), usage


def measure(setting: Setting, rounds: int, seconds: float, console: Console) -> list[Round]:
    """`rounds` rounds of both arms, alternating, with fio between all runs."""
    shard = expert_shard(setting.store)
    nbytes = max(c.nbytes for c in Store.open([setting.store]).manifest.classes)
    depth, done = 2, list[Round]()
    before = fio.direct_reads(shard, nbytes, depth, seconds).bandwidth
    for number in range(2 * rounds):
        lookahead = number % 2 == 0
        run, usage = run_once(setting, lookahead)
        depth = max(1, round(run.mean_depth))
        after = fio.direct_reads(shard, nbytes, depth, seconds, seed=number + 2).bandwidth
        done.append(Round(lookahead, run, usage, depth, (before, after)))
        before = after
        console.print(_line(done[-1]))
    return done


def expert_shard(store: Path) -> Path:
    """The largest of the store's files: experts, all of it."""
    opened = Store.open([store])
    return max(opened.shard_paths, key=lambda path: path.stat().st_size)


def _line(done: Round) -> str:
    figures = done.figures()
    return (
        f"look-ahead {'on ' if done.lookahead else 'off'}  "
        f"{figures['tokens_per_second']:.2f} tok/s, "
        f"{figures['ratio_no_foresight']:.2f} x the bound, "
        f"fio {done.bandwidths[0] / 1e9:.2f} and {done.bandwidths[1] / 1e9:.2f} GB/s"
    )


def _table(setting: Setting, arms: dict[str, dict[str, Spread]], rounds: int) -> Table:
    table = Table(
        title=f"{setting.tokens} tokens after {setting.warmup}, --ram {setting.ram} in a cgroup of "
        f"{setting.memory}; median (least–largest) of {rounds}"
    )
    table.add_column("")
    for name in arms:
        table.add_column(name, justify="right")
    for label, figure, scale, digits in ROWS:
        table.add_row(label, *(arm[figure].text(digits, scale) for arm in arms.values()))
    return table


def _verdict(arms: dict[str, dict[str, Spread]], setting: Setting) -> dict[str, bool]:
    default = arms["look-ahead on"]
    return {
        "rss_within_limit": default["peak_rss"].largest <= default["rss_limit"].least,
        "cgroup_within_limit": default["cgroup_peak"].largest <= parse_bytes(setting.memory),
        "time_within_bound": default["ratio_no_foresight"].median <= AIM,
    }


def main(
    store: Annotated[Path, typer.Argument(help="From tierrun.bench.synthetic.")],
    memory: Annotated[str, typer.Option(help="Limit of the cgroup.")] = "2GiB",
    ram: Annotated[str, typer.Option(help="Budget for experts.")] = "1GiB",
    warmup: Annotated[int, typer.Option(help="Tokens before the measured ones.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens measured.")] = 32,
    threads: Annotated[int, typer.Option(help="0: all cores but one.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of both arms.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of each fio run.")] = fio.SECONDS,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the JSON document here.")
    ] = None,
) -> None:
    """Decode a model that is larger than memory; compare with what the drive allows."""
    console = open_console()
    setting = Setting(store, memory, ram, warmup, tokens, threads)
    nbytes = Store.open([store]).manifest.expert_bytes
    console.print(f"{store}: {format_bytes(nbytes)} of experts")
    done = measure(setting, rounds, seconds, console)
    arms = {
        "look-ahead on": spreads([x for x in done if x.lookahead]),
        "look-ahead off": spreads([x for x in done if not x.lookahead]),
    }
    console.print(_table(setting, arms, rounds))
    verdict = _verdict(arms, setting)
    for name, good in verdict.items():
        console.print(f"{name}: [bold]{'yes' if good else 'NO'}[/bold]")
    results: dict[str, Any] = {
        "expert_bytes": nbytes,
        "rounds": [x.figures() | {"lookahead": x.lookahead} for x in done],
        "arms": {
            name: {figure: value._asdict() for figure, value in arm.items()}
            for name, arm in arms.items()
        },
        "verdict": verdict,
    }
    emit(document("larger_than_memory", results), json_file)


if __name__ == "__main__":
    run_script(main)
