"""Which experts were used: the share of activations that the most used ones take."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tierrun.io.errors import UsageError
from tierrun.tiers.usage import Usage, top_shares

PERCENTS = (1.0, 5.0, 10.0, 15.0, 20.0)


def shares(usage: Usage) -> dict[str, list[float]]:
    """`overall` and each layer → the shares of activations, 0 … 1, of the top `PERCENTS`.

    Raises:
        UsageError: nothing was counted yet.
    """
    if not any(row.any() for row in usage):
        raise UsageError("nothing was generated from this store yet; run it once")
    rows = {"overall": top_shares(np.concatenate(usage), PERCENTS)}
    return rows | {f"layer {i}": top_shares(row, PERCENTS) for i, row in enumerate(usage)}


def table(usage: Usage) -> Table:
    """The shares as a table in per cent."""
    activations = sum(int(row.sum()) for row in usage)
    result = Table(title=f"share of {activations} activations in the most used experts")
    result.add_column("")
    for percent in PERCENTS:
        result.add_column(f"top {percent:g} %", justify="right")
    for name, row in shares(usage).items():
        result.add_row(name, *(f"{share:.0%}".replace("%", " %") for share in row))
    return result


def record(usage: Usage) -> dict[str, Any]:
    """The shares and the counts themselves, for `--json`."""
    return {
        "percents": list(PERCENTS),
        "shares": shares(usage),
        "counts": [row.tolist() for row in usage],
    }


def plot(usage: Usage, path: Path) -> None:
    """The whole curve, share of activations by share of experts, per layer and overall.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    shares(usage)  # refuses an empty usage
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'tierrun[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for row in usage:
        axes.plot(*_curve(row), color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(*_curve(np.concatenate(usage)), color="tab:blue", linewidth=2.5, label="overall")
    axes.plot([0, 100], [0, 100], color="grey", linestyle=":", label="uniform")
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.set_xlabel("most used experts (%)")
    axes.set_ylabel("share of activations (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _curve(counts: "np.ndarray[Any, np.dtype[np.int64]]") -> tuple[list[float], list[float]]:
    percents = tuple(np.linspace(0, 100, 101).tolist())
    return list(percents), [100 * share for share in top_shares(counts, percents)]
