"""fio as the yardstick: what the drive gives to direct reads of one size and depth."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tierrun.io.errors import TierrunError, UsageError
from tierrun.io.extent import align_up

SECONDS = 3.0
ENGINE = "libaio"

_HUGE_PAGE = 2 << 20
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""fio gets huge pages for its buffers, as our slots have: with small ones it reads at a third to
all of the bandwidth, by the luck of where they lie, and would flatter us."""

_LOG_ENTRIES = 1 << 20
"""Reads of a run for which its log has room: to make more fio lets the queue run empty."""

_RAMP_SECONDS = 0.5
_RAMP_BANDWIDTH = 0.5e9
"""At which a machine is assumed to read, and to find memory for fio's buffers, at the least."""


@dataclass(frozen=True, slots=True)
class FioResult:
    """Of one fio run: bytes and reads per second, seconds within which so many reads came, from
    the call that submits them (`lat`), with what it was asked, and its reads.

    The figures are fio's own: reads that end after the warm-up, whole, over the time until the
    queue has run empty. What was in flight at the end of the warm-up makes them too high.
    `reads` are when each of these began and was noted as ended, in seconds since the warm-up.
    """

    bandwidth: float
    iops: float
    p50: float
    p95: float
    p99: float
    block_bytes: int
    depth: int
    reads: tuple[tuple[float, float], ...]


def obstacle() -> str | None:
    """Why fio cannot be run here, or None."""
    return None if shutil.which("fio") else "fio is not installed (apt install fio)"


def direct_reads(
    path: Path,
    block_bytes: int,
    depth: int,
    seconds: float = SECONDS,
    seed: int = 1,
    pattern: str = "random",
) -> FioResult:
    """Direct reads of `block_bytes` from `path`, `depth` at once, for `seconds` after a warm-up.

    Raises:
        UsageError: no fio.
        TierrunError: fio failed; says how.
    """
    reason = obstacle()
    if reason is not None:
        raise UsageError(f"{reason}; it is what our bandwidth is measured against")
    with TemporaryDirectory(prefix="tierrun-fio-") as logs:
        command = _command(path, block_bytes, depth, seconds, seed, pattern)
        document = _run([*command, f"--write_lat_log={logs}/log"])
        reads = tuple(_logged(Path(logs) / "log_lat.1.log"))
    (job,) = document["jobs"]
    read = job["read"]
    percentiles = read["lat_ns"]["percentile"]
    p50, p95, p99 = (percentiles[f"{percent}.000000"] / 1e9 for percent in (50, 95, 99))
    bandwidth, iops = float(read["bw_bytes"]), float(read["iops"])
    return FioResult(bandwidth, iops, p50, p95, p99, block_bytes, depth, reads)


def ramp_seconds(in_flight: int) -> float:
    """The warm-up of a run with so many bytes in flight."""
    return _RAMP_SECONDS + in_flight / _RAMP_BANDWIDTH


def _run(command: list[str]) -> dict[str, Any]:
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | _HUGE_PAGES)
    if run.returncode != 0:
        raise TierrunError(f"fio failed ({run.returncode}): {run.stderr.strip()[:500]}")
    # Warnings may stand before the document, in the same stream.
    document: dict[str, Any] = json.loads(run.stdout[run.stdout.index("{") :])
    return document


def _logged(log: Path) -> Iterator[tuple[float, float]]:
    """The reads in fio's log: when one ended, in milliseconds, and its latency in nanoseconds."""
    for line in log.read_text().splitlines():
        ended, latency = line.split(",")[:2]
        yield int(ended) / 1e3 - int(latency) / 1e9, int(ended) / 1e3


def _command(
    path: Path, block_bytes: int, depth: int, seconds: float, seed: int, pattern: str
) -> list[str]:
    # Buffers are as far apart as the largest block of any direction: with a size for writes, which
    # there are none of, each buffer begins in a huge page of its own, as ours do.
    apart = align_up(block_bytes, _HUGE_PAGE)
    ramp = ramp_seconds(depth * block_bytes)
    return [
        "fio",
        "--name=records",
        f"--filename={path}",
        "--readonly",
        f"--rw={'randread' if pattern == 'random' else 'read'}",
        "--direct=1",
        f"--ioengine={ENGINE}",
        f"--bs={block_bytes},{apart},{apart}",
        f"--iomem_align={_HUGE_PAGE}",
        f"--iodepth={depth}",
        "--thread",  # one process, which ends with one signal
        "--time_based",
        f"--ramp_time={int(ramp * 1000)}ms",
        f"--runtime={int(seconds * 1000)}ms",
        f"--randseed={seed}",
        "--lat_percentiles=1",
        "--disable_clat=1",  # of its three logs the one that counts from submission is enough
        "--disable_slat=1",
        f"--log_entries={_LOG_ENTRIES}",
        "--percentile_list=50:95:99",
        "--output-format=json",
    ]
