"""The report as people read it."""

from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tierrun.tools.doctor.line import Line, Report, Status

_STYLES = {
    Status.OK: "green",
    Status.UNKNOWN: "dim",
    Status.WARN: "yellow",
    Status.FAIL: "bold red",
}


def render(report: Report) -> RenderableType:
    """The lines by area, what to do below each that is not ok, and the sum of it all."""
    width = max((len(line.name) for line in report.lines), default=0)
    parts: list[RenderableType] = []
    for area, lines in groupby(report.lines, key=lambda line: line.area):
        parts += [Text(area, style="bold"), _table(list(lines), width)]
    return Group(*parts, Text(summary(report)))


def _table(lines: list[Line], width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=9)
    table.add_column(min_width=width, no_wrap=True)
    table.add_column()
    for line in lines:
        status = Text(f"  {line.status}", style=_STYLES[line.status])
        table.add_row(status, Text(line.name), Text(line.value))
        if line.advice is not None:
            table.add_row("", "", Text(f"→ {line.advice}", style="cyan"))
    return table


def summary(report: Report) -> str:
    """`20 ok, 1 unknown, 2 warn, 0 fail (1.9 s)`."""
    counts = {status: sum(line.status == status for line in report.lines) for status in Status}
    return ", ".join(f"{n} {status}" for status, n in counts.items()) + f" ({report.seconds:.1f} s)"
