"""How fast a GPU computes and is fed: measured in a few milliseconds when an engine is loaded."""

import logging
import time
from collections.abc import Callable

import torch

from tierrun.engine.storage import drive_bandwidth
from tierrun.io.store import Store
from tierrun.tiers.chunking import Rates, flops_per_token

log = logging.getLogger(__name__)

_EFFICIENCY = 1 / 8
"""Of the rate of torch's products, what whole prompts are taken to reach, attention, norms and
launches included: 6 to 10 % were measured on an H100. A chunk that is too large costs memory, one
that is too small time."""

_DRIVE = 3e9
"""Bytes per second of a drive that nobody has measured: PCIe 3."""

_SIDE = 4096
_UPLOAD_BYTES = 32 << 20
_REPEATS = 5


def measure_rates(store: Store, device: torch.device, vocabulary: int) -> Rates:
    """What `device` does in a second with the model in `store`."""
    flops, known = product_flops(device), drive_bandwidth(store)
    per_token = flops_per_token(store.manifest, vocabulary)
    rates = Rates(upload_bandwidth(device), known or _DRIVE, _EFFICIENCY * flops / per_token)
    log.debug(
        "%s: products at %.0f TFLOP/s, %.2f GFLOP a token; the drive %s %.1f GB/s",
        device,
        flops / 1e12,
        per_token / 1e9,
        "was measured at" if known else "is taken to give",
        rates.drive / 1e9,
    )
    return rates


def product_flops(device: torch.device) -> float:
    """FLOP per second of torch's own fp16 product of large square matrices."""
    x = torch.ones(_SIDE, _SIDE, dtype=torch.float16, device=device)
    out = torch.empty_like(x)
    return 2 * _SIDE**3 / _quickest(lambda: torch.mm(x, x, out=out), device)


def upload_bandwidth(device: torch.device) -> float:
    """Bytes per second of copies from pinned memory to the device."""
    source = torch.empty(_UPLOAD_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return _UPLOAD_BYTES / _quickest(lambda: target.copy_(source, non_blocking=True), device)


def _quickest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of several runs; a first one wakes whatever sleeps."""
    seconds = []
    for _ in range(1 + _REPEATS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
