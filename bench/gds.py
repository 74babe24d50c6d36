"""How fast records come from the drive into RAM and into VRAM: direct I/O against kvikio.

    python -m tierrun.bench.gds STORE

Random records of the store, whole, so many at once, by each way: `direct` is O_DIRECT into
page-aligned memory, `staged` the same into pinned memory and a copy, `gds` kvikio (natively with
nvidia-fs, else in a compatibility mode; it is said which). Where there is no kvikio or no GPU the
columns are missing, and the reason is said. Below the table is what
`--io auto` makes of these numbers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.engine.devices import choose_device
from tierrun.engine.storage import setting_of
from tierrun.engine.trials import measure_store
from tierrun.io.errors import UsageError
from tierrun.io.gds import obstacle_to_gds
from tierrun.io.measuring import DEPTHS, Plan, record_sizes
from tierrun.io.profiles import WAYS, Cell, Profile, Setting, choose_paths
from tierrun.io.reader import choose_reader
from tierrun.io.store import Store


def table_of(cells: Sequence[Cell]) -> Table:
    """A row for each size and depth, a column for each way."""
    table = Table(title="GB/s")
    ways = [way for way in WAYS if any(cell.way == way for cell in cells)]
    for name in ("record", "at once", *(way.label for way in ways)):
        table.add_column(name, justify="right")
    rates = {(cell.nbytes, cell.depth, cell.way): cell.bandwidth for cell in cells}
    for nbytes, depth in sorted({(cell.nbytes, cell.depth) for cell in cells}):
        figures = (rates.get((nbytes, depth, way)) for way in ways)
        shown = ("–" if rate is None else f"{rate / 1e9:.2f}" for rate in figures)
        table.add_row(f"{nbytes / 2**20:.2f} MiB", str(depth), *shown)
    return table


def _as_json(cell: Cell) -> dict[str, Any]:
    return {**cell.way._asdict(), **cell._asdict(), "way": cell.way.label}


def main(
    store: Annotated[Path, typer.Argument(help="Any store.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    depths: Annotated[str, typer.Option(help="Reads at once.")] = ",".join(map(str, DEPTHS)),
    seconds: Annotated[float, typer.Option(help="Of each cell.")] = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the JSON document here.")
    ] = None,
) -> None:
    """Compare the ways from the drive to RAM and to VRAM."""
    console, opened = open_console(), Store.open([store])
    usual = choose_reader("direct", opened.shard_paths)
    if usual.fallback:
        raise UsageError(f"there is nothing to compare without direct I/O: {usual.reason}")
    chosen, reason = choose_device(device)
    obstacle = obstacle_to_gds(opened.shard_paths[0])
    setting = setting_of(opened, chosen, obstacle)
    console.print(f"{setting.drives}; {setting.mode}", highlight=False, markup=False)
    if chosen.type != "cuda":
        console.print(f"no reads into VRAM: {reason}", highlight=False, markup=False)
    plan = Plan(record_sizes(opened), [int(depth) for depth in depths.split(",")], seconds)
    cells = measure_store(opened, chosen, plan, with_gds=obstacle is None)
    measured = choose_paths(Profile(setting, tuple(cells)))
    console.print(table_of(cells))
    console.print(f"--io auto: {measured.reason}", highlight=False, markup=False)
    results: dict[str, Any] = {
        "setting": {name: getattr(setting, name) for name in Setting.__slots__},
        "cells": [_as_json(cell) for cell in cells],
        "chosen": measured._asdict(),
    }
    emit(document("gds", results), json_file)


if __name__ == "__main__":
    run_script(main)
