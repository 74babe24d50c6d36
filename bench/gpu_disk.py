"""A model larger than VRAM and RAM together, decoded on a GPU inside a memory cgroup.

    python -m tierrun.bench.gpu_disk STORE --vram 4GiB --ram 4GiB --memory 6GiB

Needs root (cgroups, page cache). `tierrun.bench.gpu_decode` runs in the cgroup, page cache
included, from a cold cache; before and after it the drive is measured outside: random records of
the store, as many in flight as saturate it. The *bound* is what the ledger counts per layer:
everything that is not serving misses, and the bytes of each layer's reads at the drive's bandwidth.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from tierrun.bench import devices
from tierrun.bench.cgroup import CgroupUsage, drop_caches, memory_cgroup
from tierrun.bench.demand import Arm, Demander, open_queue
from tierrun.bench.devices import say
from tierrun.bench.report import document, emit, open_console, run_script, spread
from tierrun.io.errors import TierrunError
from tierrun.io.extent import format_bytes, parse_bytes
from tierrun.io.reader import choose_reader
from tierrun.io.reads import DEFAULT_DEPTH, PART_BYTES
from tierrun.io.store import Store

AIM = 1.3
"""Time per token over the bound: no more than this."""


def drive_bandwidth(store: Path, seconds: float) -> float:
    """Bytes per second of random records, read past the page cache where that can be."""
    opened = Store.open([store])
    reader = choose_reader("auto", opened.shard_paths).name
    shards = [record.shard for layer in opened.manifest.layers for record in layer.records]
    with open_queue(opened, reader, DEFAULT_DEPTH, PART_BYTES) as queue:
        demander = Demander(opened, queue, max(set(shards), key=shards.count))
        return demander.run(Arm(0), seconds).bandwidth


def run_inside(command: list[str], memory: int) -> CgroupUsage:
    """Run it in a cgroup of its own, from a cold page cache.

    Raises:
        TierrunError: it failed, or was killed for want of memory.
    """
    drop_caches()
    with memory_cgroup(memory) as cgroup:
        run = subprocess.run(cgroup.command(command))
        usage = cgroup.usage()
    if run.returncode != 0:
        raise TierrunError(
            f"the run in {format_bytes(memory)} ended with {run.returncode}: {usage}"
        )
    return usage


def figures(found: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    """Time per token beside the bound, by round."""
    rows = []
    for done in found["rounds"]:
        tokens, counters = len(done["steps"]), done["counters"]
        bound = done["resident"] + counters["read_bytes"] / bandwidth
        lookups = counters["hot"] + counters["warm"] + counters["cold"]
        rows.append(
            {
                "tokens_per_second": tokens / done["seconds"],
                "ratio": done["seconds"] / bound,
                "read_per_token": counters["read_bytes"] / tokens,
                "cold_share": counters["cold"] / lookups,
                "hot_share": counters["hot"] / lookups,
            }
        )
    return {name: spread([row[name] for row in rows])._asdict() for name in rows[0]}


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory, on a drive.")],
    vram: devices.VramBudget = "4GiB",
    ram: devices.RamBudget = "4GiB",
    memory: Annotated[str, typer.Option(help="Limit of the cgroup.")] = "6GiB",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in context.")] = 256,
    learn: Annotated[int, typer.Option(min=1, help="Tokens before the rounds.")] = 200,
    tokens: Annotated[int, typer.Option(min=1, help="Measured per round.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Of decoding.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of each look at the drive.")] = 3.0,
    lanes: devices.LaneMode = "auto",
    json_file: devices.JsonFile = None,
) -> None:
    """Decode with less VRAM and RAM than the experts take."""
    limit = parse_bytes(memory)
    before = drive_bandwidth(store, seconds)
    with TemporaryDirectory() as directory:
        result = Path(directory) / "decode.json"
        command = [sys.executable, "-m", "tierrun.bench.gpu_decode", str(store), "--no-fill"]
        numbers = {"prompt": prompt, "learn": learn, "tokens": tokens, "rounds": rounds}
        command += [word for name, n in numbers.items() for word in (f"--{name}", str(n))]
        command += ["--vram", vram, "--ram", ram, "--lanes", lanes, "--prefill", "0"]
        usage = run_inside([*command, "--json", str(result)], limit)
        found = json.loads(result.read_text())
    after = drive_bandwidth(store, seconds)
    bandwidth = (before + after) / 2
    shown = figures(found, bandwidth)
    table = Table(title=f"{vram} of VRAM, {ram} of RAM, in a cgroup of {memory}")
    table.add_column("")
    table.add_column("median (least–largest)", justify="right")
    for label, name, scale, digits in (
        ("decode, tokens per second", "tokens_per_second", 1.0, 2),
        ("time / bound", "ratio", 1.0, 2),
        ("read from the store per token, MB", "read_per_token", 1e-6, 1),
        ("lookups from VRAM, %", "hot_share", 100.0, 1),
        ("lookups from the store, %", "cold_share", 100.0, 1),
    ):
        row = shown[name]
        texts = [f"{row[part] * scale:.{digits}f}" for part in ("median", "least", "largest")]
        table.add_row(label, f"{texts[0]} ({texts[1]}–{texts[2]})")
    table.add_row("the drive, GB/s", f"{before / 1e9:.2f}, {after / 1e9:.2f}")
    table.add_row("peak of the cgroup", format_bytes(usage.peak_bytes))
    open_console().print(table)
    say(f"time over the bound: {shown['ratio']['median']:.2f}; aim {AIM}")
    facts = {"figures": shown, "drive": [before, after], "peak_bytes": usage.peak_bytes}
    emit(document("gpu_disk", facts | {"decode": found}), json_file)


if __name__ == "__main__":
    run_script(main)
