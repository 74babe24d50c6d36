"""One run of tierrun in `tierrun bench peers`, and the figures of the table that looks into it.

The *bound without foresight* is the sum over layers of [resident compute + max(that layer's reads
at the drive's bandwidth, its hits' compute)]; the *bound with foresight* is the larger of all reads
and all compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tierrun.bench.decode import DecodeRun
from tierrun.bench.report import Spread, spread
from tierrun.tiers.ledger import bound_seconds

RUNTIME_BYTES = 700 << 20
"""What the process may use beside resident weights and budget."""

_PARTS = ("resident", "hits", "misses", "wait")
_PER_TOKEN = (
    "hot", "warm", "cold", "read_bytes",
    "ahead_useful", "ahead_late", "ahead_wasted", "ahead_dropped",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Round:
    """One run, the most its cgroup had (0: there was none), and the drive's bandwidth before and
    after it."""

    run: DecodeRun
    cgroup_peak: int
    bandwidths: tuple[float, float]

    @property
    def bandwidth(self) -> float:
        return sum(self.bandwidths) / 2

    def figures(self) -> dict[str, float]:
        """Everything the table shows; times, sizes and lookups are per token."""
        return self._times() | self._counts() | self._memory()

    def _times(self) -> dict[str, float]:
        run, tokens, total = self.run, len(self.run.seconds), self.run.total_seconds
        blind, foresighted = bound_seconds(run.timings, self.bandwidth)
        parts = {part: sum(getattr(timing, part) for timing in run.timings) for part in _PARTS}
        return {
            "tokens_per_second": run.tokens_per_second,
            "seconds_per_token": total / tokens,
            "bound_no_foresight": blind / tokens,
            "bound_foresight": foresighted / tokens,
            "ratio_no_foresight": total / blind,
            "ratio_foresight": total / foresighted,
            **{f"{part}_seconds": seconds / tokens for part, seconds in parts.items()},
            "other_seconds": (total - sum(parts.values())) / tokens,
            "wait_share": run.counters.wait_seconds / total,
            "load_seconds": run.load_seconds,
        }

    def _counts(self) -> dict[str, float]:
        run, counters = self.run, self.run.counters
        return {
            "hit_share": 1 - counters.cold / counters.lookups,
            **{name: getattr(counters, name) / len(run.seconds) for name in _PER_TOKEN},
            "read_bandwidth": counters.read_bytes / run.total_seconds,
            "mean_depth": run.mean_depth,
            "drive_bandwidth": self.bandwidth,
        }

    def _memory(self) -> dict[str, float]:
        run = self.run
        return {
            "peak_rss": run.peak_rss,
            "rss_limit": run.resident_bytes + run.warm_bytes + RUNTIME_BYTES,
            "cgroup_peak": self.cgroup_peak,
        }


def spreads(rounds: Sequence[Round]) -> dict[str, Spread]:
    """Each figure over the rounds of one arm."""
    figures = [done.figures() for done in rounds]
    return {name: spread([row[name] for row in figures]) for name in figures[0]}


ROWS: tuple[tuple[str, str, float, int], ...] = (
    ("tokens per second", "tokens_per_second", 1, 2),
    ("time per token, ms", "seconds_per_token", 1e3, 0),
    ("bound without foresight, ms", "bound_no_foresight", 1e3, 0),
    ("bound with foresight, ms", "bound_foresight", 1e3, 0),
    ("time / bound without foresight", "ratio_no_foresight", 1, 2),
    ("time / bound with foresight", "ratio_foresight", 1, 2),
    ("  resident compute, ms", "resident_seconds", 1e3, 0),
    ("  compute of hits, ms", "hits_seconds", 1e3, 0),
    ("  compute of misses, ms", "misses_seconds", 1e3, 0),
    ("  waiting, ms", "wait_seconds", 1e3, 0),
    ("  everything else, ms", "other_seconds", 1e3, 0),
    ("waiting, % of the time", "wait_share", 100, 0),
    ("hits, %", "hit_share", 100, 1),
    ("lookups per token: hot", "hot", 1, 1),
    ("lookups per token: warm", "warm", 1, 1),
    ("lookups per token: cold", "cold", 1, 1),
    ("  read ahead in time", "ahead_useful", 1, 1),
    ("  read ahead, late", "ahead_late", 1, 1),
    ("  read ahead for nothing", "ahead_wasted", 1, 1),
    ("  dropped unread", "ahead_dropped", 1, 1),
    ("read per token, GB", "read_bytes", 1e-9, 3),
    ("read bandwidth, GB/s of all time", "read_bandwidth", 1e-9, 2),
    ("records in flight, mean", "mean_depth", 1, 2),
    ("drive, random direct reads, GB/s", "drive_bandwidth", 1e-9, 2),
    ("peak RSS, MiB", "peak_rss", 2**-20, 0),
    ("  allowed, MiB", "rss_limit", 2**-20, 0),
    ("cgroup peak, MiB", "cgroup_peak", 2**-20, 0),
    ("load, s", "load_seconds", 1, 1),
)
"""Label, figure, scale and digits of the table's rows."""
