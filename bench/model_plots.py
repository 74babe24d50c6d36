"""What `tierrun bench model --plot` draws: hit rate by budget, the share of activations that the
most used experts take, and tokens per second by budget with the bound."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tierrun.bench.cells import Cell, Results
from tierrun.bench.plots import check_plotting, save_figure

_PANEL_INCHES = (4.6, 3.9)


def plot_model(results: Results, file: Path) -> None:
    """Three panels in `file`.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    check_plotting()
    from matplotlib import pyplot

    size = (3 * _PANEL_INCHES[0], _PANEL_INCHES[1])
    figure, (hits, shares, speed) = pyplot.subplots(1, 3, figsize=size)
    by_vram = _by_vram(results)
    _draw_hits(hits, results, by_vram)
    _draw_shares(shares, results)
    _draw_speed(speed, results, by_vram)
    for axis in (hits, shares, speed):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{results.setting['model']} on {results.setting['device']}", fontsize=10)
    save_figure(figure, file)


def _by_vram(results: Results) -> bool:
    """Whether the hot tier is what differs; else it is the warm one."""
    return len({tiers["hot_bytes"] for tiers in results.details["tiers"].values()}) > 1


def _points(cells: Sequence[Cell], results: Results, by_vram: bool) -> list[tuple[float, Cell]]:
    """Cells by the size of a tier, GiB."""
    name, tiers = "hot_bytes" if by_vram else "warm_bytes", results.details["tiers"]
    found = [(tiers[f"{c.key['vram']} / {c.key['ram']}"][name] / 2**30, c) for c in cells]
    return sorted(found, key=lambda point: point[0])


def _lines(results: Results, by_vram: bool) -> dict[str, list[Cell]]:
    """Cells that differ in the budget on the axis alone."""
    other, lines = "ram" if by_vram else "vram", dict[str, list[Cell]]()
    several = len({cell.key[other] for cell in results.cells}) > 1
    for cell in results.cells:
        label = f"{cell.key['test']}, --{other} {cell.key[other]}" if several else cell.key["test"]
        lines.setdefault(str(label), []).append(cell)
    return lines


def _draw_hits(axis: Any, results: Results, by_vram: bool) -> None:
    metrics = {metric.name: metric for metric in results.metrics}
    whole = int(results.setting["expert_bytes"]) / 2**30
    for label, cells in _lines(results, by_vram).items():
        points = _points(cells, results, by_vram)
        memory = [100 * (1 - cell.spread(metrics["cold"]).median) for _, cell in points]
        hot = [100 * cell.spread(metrics["hot"]).median for _, cell in points]
        sizes = [size for size, _ in points]
        (drawn,) = axis.plot(sizes, memory, marker="o", markersize=3, label=f"{label}: memory")
        if any(hot):
            colour = drawn.get_color()
            axis.plot(sizes, hot, marker=".", linestyle="--", color=colour, label=f"{label}: VRAM")
    axis.axvline(whole, color="grey", linestyle=":", label="all experts")
    axis.set(ylim=(0, 102), xlim=(0, None), ylabel="lookups served (%)")
    axis.set_xlabel(_axis_name(by_vram))
    axis.legend(fontsize=6)


def _draw_shares(axis: Any, results: Results) -> None:
    percents = results.details["usage_percents"]
    for label, curve in list(results.details["usage_curves"].items())[:1]:
        axis.plot(percents, [100 * share for share in curve], label=f"this run ({label})")
    axis.plot([0, 100], [0, 100], color="grey", linestyle=":", label="uniform")
    axis.set(xlim=(0, 100), ylim=(0, 100))
    axis.set_xlabel("most used experts of a layer (%)")
    axis.set_ylabel("share of activations (%)")
    axis.legend(fontsize=7, loc="lower right")


def _draw_speed(axis: Any, results: Results, by_vram: bool) -> None:
    metrics = {metric.name: metric for metric in results.metrics}
    for label, cells in _lines(results, by_vram).items():
        points = _points(cells, results, by_vram)
        sizes = [size for size, _ in points]
        spreads = [cell.spread(metrics["tokens_per_second"]) for _, cell in points]
        (drawn,) = axis.plot(sizes, [s.median for s in spreads], marker="o", markersize=3)
        drawn.set_label(label)
        low, high = [s.least for s in spreads], [s.largest for s in spreads]
        colour = drawn.get_color()
        axis.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        bound = [cell.spread(metrics["bound"]).median for _, cell in points]
        axis.plot(sizes, bound, linestyle="--", marker=".", color=colour, label=f"{label}: bound")
    axis.set_yscale("log")
    axis.set_xlabel(_axis_name(by_vram))
    axis.set_ylabel("tokens per second")
    axis.legend(fontsize=6)


def _axis_name(by_vram: bool) -> str:
    return "experts in VRAM (GiB)" if by_vram else "experts in RAM (GiB)"
