"""What a layer takes for one token beside its weights and reads: Python, transformers, torch's
small operations, leases. Measured by decoding a miniature, whose weights take next to no time."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tierrun.bench.checkpoint import Shape
from tierrun.bench.synthetic_store import build_store
from tierrun.engine.engine import load

_LAYERS, _WIDTH, _VOCABULARY = 8, 64, 256
_WARM_UP, _TOKENS = 8, 32


def layer_overhead(top_k: int) -> float:
    """Seconds a layer, of a token that chooses `top_k` experts in each; all of them in memory."""
    miniature = Shape(
        layers=_LAYERS,
        experts=2 * top_k,
        top_k=top_k,
        hidden=_WIDTH,
        intermediate=_WIDTH,
        heads=2,
        kv_heads=1,
        head_dim=32,
        vocabulary=_VOCABULARY,
    )
    ids = [number % _VOCABULARY for number in range(1 + _WARM_UP + _TOKENS)]
    with TemporaryDirectory(prefix="tierrun-plan-") as directory, _quiet():
        build_store(Path(directory) / "store", miniature, "bf16", "bf16")
        with load(Path(directory) / "store", ram="64MiB", device="cpu") as engine:
            records = engine.generate([0, 1, 2, 3], len(ids), fixed=ids, ignore_eos=True)
            seconds = [record.figures.seconds for record in records]
    return median(seconds[-_TOKENS:]) / _LAYERS


@contextmanager
def _quiet() -> Iterator[None]:
    """What the miniature's engine chooses is not the user's concern."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
