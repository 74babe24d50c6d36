"""fio as the yardstick: what the drive gives to random direct reads of one size and depth."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tierrun.io.errors import TierrunError, UsageError

SECONDS = 3.0

_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""fio gets huge pages for its buffers, as our slots have: with small ones it reads at a third to
all of the bandwidth, by the luck of where they lie, and would flatter us."""


@dataclass(frozen=True, slots=True)
class FioResult:
    """Bytes per second of one fio run, and with what it was asked."""

    bandwidth: float
    block_bytes: int
    depth: int


def obstacle() -> str | None:
    """Why fio cannot be run here, or None."""
    return None if shutil.which("fio") else "fio is not installed"


def random_reads(
    path: Path, block_bytes: int, depth: int, seconds: float = SECONDS, seed: int = 1
) -> FioResult:
    """Random direct reads of `block_bytes` from `path`, `depth` at once, for `seconds`.

    Raises:
        UsageError: no fio.
        TierrunError: fio failed; says how.
    """
    reason = obstacle()
    if reason is not None:
        raise UsageError(f"{reason}; it is what our bandwidth is measured against")
    command = _command(path, block_bytes, depth, seconds, seed)
    environment = os.environ | _HUGE_PAGES
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode != 0:
        raise TierrunError(f"fio failed ({run.returncode}): {run.stderr.strip()[:500]}")
    (job,) = json.loads(run.stdout)["jobs"]
    return FioResult(float(job["read"]["bw_bytes"]), block_bytes, depth)


def _command(path: Path, block_bytes: int, depth: int, seconds: float, seed: int) -> list[str]:
    return [
        "fio",
        "--name=records",
        f"--filename={path}",
        "--readonly",
        "--rw=randread",
        "--direct=1",
        "--ioengine=libaio",
        f"--bs={block_bytes}",
        f"--iodepth={depth}",
        "--time_based",
        f"--runtime={int(seconds * 1000)}ms",
        f"--randseed={seed}",
        "--output-format=json",
    ]
