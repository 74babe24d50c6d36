"""Tables of text, for a terminal and for Markdown, and the raw numbers as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from tierrun.bench.cells import Cell, Metric, Results, Value
from tierrun.io.extent import format_bytes

LEFT = (
    *("reader", "pattern", "directory", "to", "verdict"),
    *("test", "layer", "codec", "device", "kernel", "from"),
    *("vram", "ram", "by", "path", "load", "arm"),
)
"""Columns of words; all others are numbers, which stand to the right."""


class Sheet(NamedTuple):
    """A table: every row has as many texts as there are columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in self.columns:
            table.add_column(name, justify="left" if name in LEFT else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """As GitHub shows it."""
        rules = (" --- " if name in LEFT else " ---: " for name in self.columns)
        lines = [_line(self.columns), "|" + "|".join(rules) + "|", *map(_line, self.rows)]
        return f"{self.title}\n\n" + "\n".join(lines) + "\n"


def sheet_of(results: Results) -> Sheet:
    """A row for each cell: what differs between them, the first metric with its spread, medians of
    the others. What is the same in all is in the title."""
    names, common = split_keys([cell.key for cell in results.cells])
    first, *others = results.metrics
    rounds = max((len(cell.samples[first.name]) for cell in results.cells), default=0)
    return Sheet(
        title=f"{in_words(common) or results.benchmark}: median (least–largest) of {rounds} rounds",
        columns=(*names, *(metric.label for metric in results.metrics)),
        rows=tuple(
            (
                *(show(name, cell.key[name]) for name in names),
                cell.spread(first).text(first.digits, first.scale),
                *(_median(cell, metric) for metric in others),
            )
            for cell in results.cells
        ),
    )


def split_keys(keys: Sequence[Mapping[str, Value]]) -> tuple[list[str], dict[str, Value]]:
    """The names whose values differ between `keys`, and the values that do not."""
    if not keys:
        return [], {}
    common = {
        name: value
        for name, value in keys[0].items()
        if all(key.get(name) == value for key in keys)
    }
    return [name for name in keys[0] if name not in common], common


def show(name: str, value: Value) -> str:
    """A value of a key, as in its column."""
    if name != "bytes":
        return str(value)
    nbytes = int(value)
    if nbytes & (nbytes - 1):  # no power of two
        return f"{nbytes / 1e6:.2f} MB"
    number, unit = format_bytes(nbytes).split()
    return f"{float(number):g} {unit}"


def in_words(key: Mapping[str, Value]) -> str:
    """Values of a key, without the columns' titles above them."""
    named = ("depth", "to", "from", "threads", "tokens")
    return ", ".join(f"{n} {v}" if n in named else show(n, v) for n, v in key.items())


def to_csv(results: Results) -> str:
    """A line for each cell; medians with least and largest, bytes and seconds."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = list(results.cells[0].key) if results.cells else []
    parts = ("median", "least", "largest")
    writer.writerow([*names, *(f"{m.name}_{part}" for m in results.metrics for part in parts)])
    for cell in results.cells:
        numbers = (number for metric in results.metrics for number in cell.spread(metric))
        writer.writerow([*(cell.key[name] for name in names), *numbers])
    return file.getvalue()


def _median(cell: Cell, metric: Metric) -> str:
    return f"{cell.spread(metric).median * metric.scale:,.{metric.digits}f}"


def _line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
