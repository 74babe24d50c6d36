"""What `tierrun bench pipeline --plot` draws: bandwidth beside its bound, and where time goes."""

from pathlib import Path

from tierrun.bench.cells import Results
from tierrun.bench.plots import check_plotting, save_figure

_PARTS = {"reads": "waits for reads", "copies": "waits for copies", "host": "host"}


def plot_pipeline(results: Results, file: Path) -> None:
    """Two panels in `file`.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    check_plotting()
    from matplotlib import pyplot

    metrics = {metric.name: metric for metric in results.metrics}
    names = [f"{cell.key['path']}\n{cell.key['load']}" for cell in results.cells]
    places = list(range(len(names)))

    def medians(name: str, scale: float) -> list[float]:
        return [cell.spread(metrics[name]).median * scale for cell in results.cells]

    figure, (speed, time) = pyplot.subplots(1, 2, figsize=(max(8, 3 * len(names)), 4))
    speed.bar(places, medians("bandwidth", 1e-9), width=0.6, label="measured")
    for place, bound in zip(places, medians("bound", 1e-9), strict=True):
        label = "bound" if place == 0 else None
        speed.hlines(bound, place - 0.4, place + 0.4, color="black", linestyle="--", label=label)
    speed.set_ylabel("GB/s")
    below = [0.0] * len(names)
    for part, label in _PARTS.items():
        heights = medians(part, 100)
        time.bar(places, heights, width=0.6, bottom=below, label=label)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    time.set_ylabel("time (%)")
    for axis in (speed, time):
        axis.set_xticks(places, names, fontsize=7)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle(f"{results.setting['model']} on {results.setting['device']}", fontsize=10)
    save_figure(figure, file)
