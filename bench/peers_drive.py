"""What the drive gives beside an arm of `tierrun bench peers`: fio's figure, where fio is there."""

from pathlib import Path

from tierrun.bench import fio
from tierrun.bench.model_bound import drive_bandwidth
from tierrun.io.reads import DEFAULT_DEPTH
from tierrun.io.store import Store

_SECONDS = 0.9


def measured_by() -> str:
    """Whose figure it is."""
    return "tierrun bench io's own reads" if fio.obstacle() else f"fio ({fio.ENGINE})"


def bandwidth_of(store: Path) -> float:
    """Bytes per second of random direct reads of the store's largest records, as many at once as
    the engine issues.

    Raises:
        TierrunError: it cannot be measured.
    """
    if fio.obstacle() is not None:
        return drive_bandwidth([store], _SECONDS)
    opened = Store.open([store])
    path = max(opened.shard_paths, key=lambda path: path.stat().st_size)
    nbytes = max(c.nbytes for c in opened.manifest.classes)
    return fio.direct_reads(path, nbytes, DEFAULT_DEPTH, _SECONDS).bandwidth
