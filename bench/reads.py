"""How much of the drive's bandwidth the demand path reads with, against fio on the same file.

    python -m tierrun.bench.reads SYNTHETIC/store

Randomly chosen records are demanded from the read queue, into slots like the warm tier's, in two
ways: *saturating* (the next record is demanded when one arrives) and in *batches* (as a layer
with so many misses does: all at once, and the next batch when the last has arrived). Around each
run fio reads the same file at random, with direct I/O, the record's size, and the mean number of
records that our queue had in flight in a pilot run, rounded. Every record is read once before, so
that checksums, which are verified at the first read, are not part of it.
"""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from tierrun.bench import fio
from tierrun.bench.demand import Arm, Demander, open_queue
from tierrun.bench.report import Spread, document, emit, open_console, run_script, spread
from tierrun.bench.yardstick import alternate
from tierrun.io.reads import DEFAULT_DEPTH, PART_BYTES
from tierrun.io.store import Store

AIM = 0.9
"""Of fio's bandwidth, saturating."""


class Figures(NamedTuple):
    """All rounds of one arm; `ratio` is ours over the mean of fio before and after, by round."""

    ours: Spread
    fio: Spread
    ratio: Spread
    batch_seconds: Spread
    mean_depth: float
    fio_depth: int


def compare(demander: Demander, path: Path, nbytes: int, arm: Arm, plan: "Plan") -> Figures:
    """fio, ours, fio, ours, …, fio on one arm."""
    pilot = demander.run(arm, plan.seconds / 2)
    depth = max(1, round(pilot.mean_depth))
    turns = alternate(
        lambda number: demander.run(arm, plan.seconds),
        lambda number: fio.direct_reads(path, nbytes, depth, plan.seconds, seed=number + 1),
        plan.rounds,
    )
    return Figures(
        ours=spread([reading.bandwidth for reading in turns.ours]),
        fio=spread([result.bandwidth for result in turns.yardsticks]),
        ratio=spread(turns.ratios(lambda mine: mine.bandwidth, lambda other: other.bandwidth)),
        batch_seconds=spread([reading.batch_seconds for reading in turns.ours]),
        mean_depth=sum(reading.mean_depth for reading in turns.ours) / len(turns.ours),
        fio_depth=depth,
    )


class Plan(NamedTuple):
    """How long and how often."""

    seconds: float
    rounds: int


def _table(figures: dict[str, Figures], plan: Plan) -> Table:
    table = Table(title=f"GB/s, median (least–largest) of {plan.rounds} rounds")
    table.add_column("demanded")
    for name in ("ours", "fio", "ours / fio", "ms per batch", "in flight", "fio's depth"):
        table.add_column(name, justify="right")
    for name, row in figures.items():
        table.add_row(
            name,
            row.ours.text(scale=1e-9),
            row.fio.text(scale=1e-9),
            row.ratio.text(),
            row.batch_seconds.text(1, scale=1e3),
            f"{row.mean_depth:.2f}",
            str(row.fio_depth),
        )
    return table


def _as_json(row: Figures) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Spread) else value
        for name, value in row._asdict().items()
    }


def main(
    store: Annotated[Path, typer.Argument(help="From tierrun bench store.")],
    depth: Annotated[int, typer.Option(help="Parts in flight.")] = DEFAULT_DEPTH,
    part: Annotated[int, typer.Option(help="Bytes of a part.")] = PART_BYTES,
    reader: Annotated[str, typer.Option(help="direct, mmap, buffered or gds.")] = "direct",
    rounds: Annotated[int, typer.Option(min=1, help="Of fio, ours, fio.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of each run.")] = 2.0,
    batches: Annotated[str, typer.Option(help="Sizes of the batches.")] = "1,2,4,8",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the JSON document here.")
    ] = None,
) -> None:
    """Compare the bandwidth of demand reads with fio's."""
    console = open_console()
    opened, plan = Store.open([store]), Plan(seconds, rounds)
    path = max(opened.shard_paths, key=lambda path: path.stat().st_size)
    nbytes = max(c.nbytes for c in opened.manifest.classes)
    arms = [Arm(0), *(Arm(int(size)) for size in batches.split(","))]
    with open_queue(opened, reader, depth, part) as queue:
        demander = Demander(opened, queue, opened.shard_paths.index(path))
        first = demander.read_each_once()
        console.print(f"first read of each record: {first.bandwidth / 1e9:.2f} GB/s with checksums")
        figures = {arm.name: compare(demander, path, nbytes, arm, plan) for arm in arms}
    console.print(_table(figures, plan))
    good = figures["saturating"].ratio.median >= AIM
    console.print(f"at least {AIM:.0%} of fio: [bold]{'yes' if good else 'NO'}[/bold]")
    results: dict[str, Any] = {
        "record_bytes": nbytes,
        "depth": depth,
        "part_bytes": part,
        "reader": reader,
        "first_read_bandwidth": first.bandwidth,
        "arms": {name: _as_json(row) for name, row in figures.items()},
        "verdict": {"bandwidth_reached": good},
    }
    emit(document("reads", results), json_file)


if __name__ == "__main__":
    run_script(main)
