"""The first metric by size, tokens or threads, drawn with matplotlib, which is an extra."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tierrun.bench.cells import Cell, Metric, Results
from tierrun.bench.sheets import in_words, show, split_keys
from tierrun.io.errors import UsageError

_PANEL_INCHES = (4.0, 3.8)
_WIDE = 20
"""Largest over least value from which on a linear axis would flatten the low ones."""

_AXES = ("bytes", "tokens", "threads")
"""What a line may go along; the first of them that varies."""

_LINES = ("depth", "codec", "test")
"""What may tell the lines of a panel apart."""


class _Line(NamedTuple):
    """Cells that differ by `axis` only."""

    label: str
    axis: str
    cells: list[Cell]


def check_plotting() -> None:
    """Raises UsageError: matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'tierrun[plot]'") from None
    matplotlib.use("Agg")


def plot_results(results: Results, file: Path) -> None:
    """The first metric by record size, tokens or threads: a panel for each kind of cell, a line for
    each depth, codec or test, the spread of the rounds shaded.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    check_plotting()
    from matplotlib import pyplot

    _, common = split_keys([cell.key for cell in results.cells])
    panels = _panels(results.cells, common)
    size = (_PANEL_INCHES[0] * len(panels), _PANEL_INCHES[1])
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, ((title, along), lines) in zip(axes[0], panels.items(), strict=True):
        _draw(axis, lines, results.metrics[0])
        axis.set_xlabel("size (MB)" if along == "bytes" else along)
        axis.set_title(title, fontsize=9)
    axes[0][0].set_ylabel(results.metrics[0].label)
    _scale(axes[0][0], [cell.spread(results.metrics[0]).median for cell in results.cells])
    figure.suptitle(in_words(common) or results.benchmark, fontsize=10)
    save_figure(figure, file)


def save_figure(figure: Any, file: Path) -> None:
    """Write it, and let go of it.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib import pyplot

    figure.tight_layout()
    try:
        figure.savefig(file, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {file}: {error}") from None
    finally:
        pyplot.close(figure)


def _panels(cells: Sequence[Cell], common: Collection[str]) -> dict[tuple[str, str], list[_Line]]:
    """Lines by the panel they are in, which has a title and an axis."""
    panels = dict[tuple[str, str], list[_Line]]()
    names = [name for name in cells[0].key if name in _LINES]
    for title, group in _grouped(cells, {*_AXES, *names, *common}).items():
        for line in _grouped(group, cells[0].key.keys() - set(names)).values():
            for made in _lines(line, names):
                panels.setdefault((title, made.axis), []).append(made)
    return panels


def _lines(cells: Sequence[Cell], names: Sequence[str]) -> Iterator[_Line]:
    """Of `cells`, which have the same `names`: along the first axis that varies, a line for each
    value of the others."""
    there = [name for name in _AXES if name in cells[0].key]
    varying = [name for name in there if len({cell.key[name] for cell in cells}) > 1]
    axis, others = (varying or there)[0], varying[1:]
    for line in _grouped(cells, cells[0].key.keys() - set(others)).values():
        yield _Line(in_words({name: line[0].key[name] for name in (*names, *others)}), axis, line)


def _draw(axis: Any, lines: Sequence[_Line], metric: Metric) -> None:
    for label, name, cells in lines:
        unit = 1e6 if name == "bytes" else 1
        points = sorted((int(cell.key[name]) / unit, cell.spread(metric)) for cell in cells)
        places = [place for place, _ in points]
        middle, least, largest = (
            [spread[part] * metric.scale for _, spread in points] for part in range(3)
        )
        (drawn,) = axis.plot(places, middle, marker="o", markersize=3, label=label)
        axis.fill_between(places, least, largest, color=drawn.get_color(), alpha=0.15, linewidth=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _scale(axis: Any, values: Sequence[float]) -> None:
    """From zero, or where memory stands beside drives, logarithmic."""
    if max(values) > _WIDE * min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=0)


def _grouped(cells: Iterable[Cell], without: Collection[str]) -> dict[str, list[Cell]]:
    """Cells by all of their keys but some, in words."""
    groups = dict[str, list[Cell]]()
    for cell in cells:
        words = [show(name, value) for name, value in cell.key.items() if name not in without]
        groups.setdefault(" · ".join(words), []).append(cell)
    return groups
