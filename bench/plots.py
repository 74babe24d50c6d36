"""Bandwidth by size and depth, drawn with matplotlib, which is an extra."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from tierrun.bench.cells import Cell, Metric, Results
from tierrun.bench.sheets import in_words, show, split_keys
from tierrun.io.errors import UsageError

_PANEL_INCHES = (4.0, 3.8)
_WIDE = 20
"""Largest over least bandwidth from which on a linear axis would flatten the slow ones."""


def check_plotting() -> None:
    """Raises UsageError: matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'tierrun[plot]'") from None
    matplotlib.use("Agg")


def plot_results(results: Results, file: Path) -> None:
    """The first metric by record size: a panel for each kind of cell, a line for each depth, the
    spread of the rounds shaded.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    check_plotting()
    from matplotlib import pyplot

    _, common = split_keys([cell.key for cell in results.cells])
    panels = _grouped(results.cells, {"bytes", "depth", *common})
    size = (_PANEL_INCHES[0] * len(panels), _PANEL_INCHES[1])
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (title, cells) in zip(axes[0], panels.items(), strict=True):
        _draw(axis, cells, results.metrics[0])
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


def _draw(axis: Any, cells: Sequence[Cell], metric: Metric) -> None:
    for label, line in _grouped(cells, cells[0].key.keys() - {"depth"}).items():
        points = sorted((int(cell.key["bytes"]) / 1e6, cell.spread(metric)) for cell in line)
        sizes = [size for size, _ in points]
        middle, least, largest = (
            [spread[part] * metric.scale for _, spread in points] for part in range(3)
        )
        (drawn,) = axis.plot(sizes, middle, marker="o", markersize=3, label=f"depth {label}")
        axis.fill_between(sizes, least, largest, color=drawn.get_color(), alpha=0.15, linewidth=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("record (MB)")
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
