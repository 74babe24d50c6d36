"""Which experts a store's models have used, counted over all runs, in a small file beside it.

The file is `usage.json` in the store, or in the user's state directory where the store is
read-only. It is written whole and renamed, under a lock, so that two runs at once both count.
"""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tierrun.io.store import Manifest

log = logging.getLogger(__name__)

Usage = list[NDArray[np.int64]]
"""Per layer, how often each expert was chosen by a token."""

_FILE = "usage.json"


class UsageFile:
    """The usage counts of the store at `root`."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._beside = root / _FILE
        digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
        state = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser()
        self._fallback = state / "tierrun" / f"{root.resolve().name}-{digest}.json"
        self._fingerprint = manifest.fingerprint
        self._sizes = [len(layer.records) for layer in manifest.layers]

    @property
    def path(self) -> Path:
        """Where the counts are, or will be."""
        if self._beside.exists() and os.access(self._beside, os.W_OK):
            return self._beside
        return self._beside if os.access(self._beside.parent, os.W_OK) else self._fallback

    def read(self) -> Usage:
        """The counts so far; zeros where there are none, or where they are of another model."""
        try:
            document = json.loads(self.path.read_text())
            counts = [np.array(row, dtype=np.int64) for row in document["counts"]]
        except FileNotFoundError:
            return self._zeros()
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            log.warning("%s is unreadable; usage counts start again", self.path)
            return self._zeros()
        same = document.get("fingerprint") == self._fingerprint
        if not same or [row.shape for row in counts] != [(size,) for size in self._sizes]:
            log.warning("%s is of another model; usage counts start again", self.path)
            return self._zeros()
        return counts

    def add(self, counts: Usage) -> None:
        """Add `counts` to the file; a failure is logged, never raised into a generation."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                total = [old + new for old, new in zip(self.read(), counts, strict=True)]
                self._write(total)
        except OSError as error:
            log.warning("usage counts not saved to %s: %s", self.path, error.strerror)

    def _write(self, counts: Usage) -> None:
        document = {
            "fingerprint": self._fingerprint,
            "counts": [row.tolist() for row in counts],
        }
        fd, name = tempfile.mkstemp(dir=self.path.parent, prefix=".usage-")
        try:
            with os.fdopen(fd, "w") as file:
                json.dump(document, file)
            os.chmod(name, 0o644)  # others may run the store too
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise

    def _zeros(self) -> Usage:
        return [np.zeros(size, dtype=np.int64) for size in self._sizes]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def top_shares(counts: NDArray[np.int64], percents: tuple[float, ...]) -> list[float]:
    """The share of activations that the most used `percents` of experts take, each 0 … 1.

    A fraction of an expert counts in proportion, so that 1 % of 32 experts is 0.32 of the first.
    """
    total = counts.sum()
    if total == 0:
        return [0.0] * len(percents)
    cumulative = np.concatenate([[0], np.sort(counts)[::-1].cumsum()])
    places = [percent / 100 * len(counts) for percent in percents]
    return [float(np.interp(p, np.arange(len(cumulative)), cumulative) / total) for p in places]
