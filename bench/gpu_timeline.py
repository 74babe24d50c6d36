"""One chunk of a prompt and one token of decode as a timeline that Perfetto opens.

    python -m tierrun.bench.gpu_timeline STORE --vram 20%experts --out timeline.json

Open the file at https://ui.perfetto.dev. What the GPU does is known by events of our own on its
streams (`tierrun.io.timeline`): a batch of copies, an experts group of a prompt, what lies between
two layers' experts, a recorded segment. Each takes from when its stream comes to it until it is
done, including what its stream waits for the host in between: copies may be faster than is said,
and the GPU may have less to do. Small work apart from these (tokens are grouped by expert) is not
seen, and what a segment's kernels read in RAM, in place, is no copy. The chunk and the token run in
turn without a timeline, too; what is shown is the recording whose wall time is the median.
"""

import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table

from tierrun.bench import devices
from tierrun.bench.devices import Setting, say, synchronise
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.bench.spans import Interval, chrome_trace, common, gaps, length, merged
from tierrun.bench.stream import token_stream
from tierrun.engine.engine import Engine
from tierrun.engine.gpu.clock import CudaClock
from tierrun.io.errors import UsageError
from tierrun.io.timeline import (
    ASIDE,
    DOWN,
    EXPERTS,
    HOST,
    LANE,
    READS,
    REST,
    SEGMENTS,
    UP,
    Clock,
    Span,
    Timeline,
)

WORK = "wall time"
"""A track of the bench: all of the work."""

COMPUTE, UPLOADS = (EXPERTS, REST, SEGMENTS), (UP, ASIDE)
DEVICE = *COMPUTE, *UPLOADS, DOWN
TRACKS = WORK, UP, EXPERTS, REST, SEGMENTS, ASIDE, DOWN, HOST, LANE, READS

_WARMUP = 2
_FIRST_TOKENS = 32


class Take(NamedTuple):
    """A piece of work once, recorded; `error` in seconds, of the device's spans."""

    begun: float
    ended: float
    spans: list[Span]
    error: float = 0.0

    @property
    def wall(self) -> float:
        return self.ended - self.begun

    def union(self, *tracks: str) -> list[Interval]:
        """When something of these was under way, within the wall time."""
        return common(merged(map(_interval, self.of(*tracks))), [(self.begun, self.ended)])

    def of(self, *tracks: str) -> list[Span]:
        """The spans of these."""
        return [span for span in self.spans if span.track in tracks]


def _interval(span: Span) -> Interval:
    return span.start, span.end


class Taken(NamedTuple):
    """A piece of work several times: seconds without a timeline, and with one."""

    unrecorded: list[float]
    takes: list[Take]

    @property
    def median(self) -> Take:
        return sorted(self.takes, key=lambda take: take.wall)[len(self.takes) // 2]


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of `work`, from a device that has nothing to do."""
    synchronise(device)
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def recorded(work: Callable[[], object], device: str, clock: Clock) -> Take:
    """The same with a timeline, which also shows what goes on aside when the work is over."""
    with Timeline(clock) as timeline:
        begun = time.perf_counter()
        work()
        ended = time.perf_counter()
        synchronise(device)
    spans = [Span(WORK, "all of it", begun, ended), *timeline.spans]
    return Take(begun, ended, spans, timeline.error)


def taken(work: Iterable[Callable[[], object]], device: str, clock: Clock) -> Taken:
    """Of the pieces in `work` every second one is recorded."""
    unrecorded, takes = list[float](), list[Take]()
    for number, piece in enumerate(work):
        if number % 2:
            takes.append(recorded(piece, device, clock))
        else:
            unrecorded.append(timed(piece, device))
    return Taken(unrecorded, takes)


def measure(
    engine: Engine, device: str, clock: Clock, ubatch: int, rounds: int, tokens: int
) -> dict[str, Taken]:
    """The same chunk again and again, then tokens after it."""
    vocabulary = engine.model.config.get_text_config().vocab_size
    stream = token_stream(ubatch + _FIRST_TOKENS + 2 * tokens, vocabulary)
    session = engine.session()

    def chunk() -> None:
        session.reset()
        session.prefill(stream[:ubatch])

    for _ in range(_WARMUP):
        chunk()
    chunks = taken([chunk] * (2 * rounds), device, clock)
    say("the chunk is recorded")
    rest = stream[ubatch:]
    for token in rest[:_FIRST_TOKENS]:
        session.prefill([token])
    steps = [partial(session.prefill, [token]) for token in rest[_FIRST_TOKENS:]]
    return {f"prefill of {ubatch} tokens": chunks, "a token": taken(steps, device, clock)}


ROWS = (
    ("wall_ms", "wall time, ms", 2),
    ("unrecorded_wall_ms", "wall time without a timeline, ms", 2),
    ("up_mb", "copied to the device, MB", 1),
    ("up_busy", "copies to it under way, % of the wall time", 1),
    ("up_behind_compute", "of that, while the GPU computes, %", 1),
    ("up_rate_busy", "GB/s while copies are under way", 1),
    ("up_share_busy", "  that is % of the bandwidth of large copies", 1),
    ("up_rate_wall", "GB/s over the whole wall time", 1),
    ("up_share_wall", "  that is % of the bandwidth of large copies", 1),
    ("up_rate_unrecorded", "GB/s over the wall time without a timeline", 1),
    ("up_share_unrecorded", "  that is % of the bandwidth of large copies", 1),
    ("compute_busy", "GPU computing, % of the wall time", 1),
    ("idle", "GPU neither computing nor copying, % of it", 1),
)
"""Key in the JSON document, label and digits of each figure."""


def figures(work: Taken, upload: float) -> dict[str, float]:
    """`ROWS`, where large copies reach `upload` bytes per second."""
    take, plain = work.median, statistics.median(work.unrecorded)
    up, compute, copies = take.union(*UPLOADS), take.union(*COMPUTE), take.of(*UPLOADS)
    nbytes, busy = sum(span.nbytes for span in copies), length(up)
    while_copying = length(merged(map(_interval, copies)))  # also when the work is over
    seconds = {"busy": while_copying, "wall": take.wall, "unrecorded": plain}
    rates = {name: nbytes / taken if taken else 0.0 for name, taken in seconds.items()}
    found = {
        "wall_ms": take.wall * 1e3,
        "unrecorded_wall_ms": plain * 1e3,
        "up_mb": nbytes / 1e6,
        "up_busy": 100 * busy / take.wall,
        "up_behind_compute": 100 * length(common(up, compute)) / busy if busy else 0.0,
        "compute_busy": 100 * length(compute) / take.wall,
        "idle": 100 * length(_idle(take)) / take.wall,
    }
    found |= {f"up_rate_{name}": rate / 1e9 for name, rate in rates.items()}
    return found | {f"up_share_{name}": 100 * rate / upload for name, rate in rates.items()}


def _idle(take: Take) -> list[Interval]:
    return gaps(take.union(*DEVICE), (take.begun, take.ended))


class Kind(NamedTuple):
    """Spans of one kind: how many, and their milliseconds."""

    times: int
    total: float
    median: float
    longest: float


def kinds(take: Take) -> dict[str, Kind]:
    """What the GPU did by track and name (numbers apart), and the gaps, on the whole wall time."""
    found = defaultdict[str, list[Interval]](list)
    for span in sorted(take.of(*DEVICE), key=lambda span: span.start):
        name = re.sub(r"\d+", "N", span.name)
        found[f"{span.track}, {name}"].append(_interval(span))
    whole = take.begun, take.ended
    copying, silent = take.union(*UPLOADS, DOWN), gaps(take.union(*COMPUTE), whole)
    found["no compute, copies under way"] = common(silent, copying)
    found["nothing to do"] = _idle(take)
    return {name: _kind(intervals) for name, intervals in found.items() if intervals}


def _kind(intervals: Sequence[Interval]) -> Kind:
    taken = [(end - start) * 1e3 for start, end in intervals]
    return Kind(len(taken), sum(taken), statistics.median(taken), max(taken))


def figures_table(found: dict[str, Taken], upload: float) -> Table:
    """One column per piece of work."""
    made = Table(title=f"large copies from pinned memory: {upload / 1e9:.1f} GB/s")
    made.add_column("")
    for name in found:
        made.add_column(name, justify="right")
    columns = [figures(work, upload) for work in found.values()]
    for key, label, digits in ROWS:
        made.add_row(label, *(f"{column[key]:.{digits}f}" for column in columns))
    return made


def kinds_table(title: str, found: dict[str, Kind]) -> Table:
    """One row per kind."""
    made = Table(title=f"{title}: what the GPU did, ms")
    for name in ("", "times", "together", "median", "longest"):
        made.add_column(name, justify="right" if name else "left")
    for name, kind in found.items():
        made.add_row(name, str(kind.times), *(f"{value:.3f}" for value in kind[1:]))
    return made


def results(work: Taken, upload: float) -> dict[str, Any]:
    """Of one piece of work, for the JSON document."""
    take = work.median
    return {
        "figures": figures(work, upload),
        "kinds": {name: kind._asdict() for name, kind in kinds(take).items()},
        "wall_ms": [one.wall * 1e3 for one in work.takes],
        "unrecorded_wall_ms": [seconds * 1e3 for seconds in work.unrecorded],
        "clock_error_us": take.error * 1e6,
    }


def show(found: dict[str, Taken], upload: float) -> None:
    """Print the tables."""
    console = open_console()
    console.print(figures_table(found, upload))
    for name, work in found.items():
        console.print(kinds_table(name, kinds(work.median)))


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    device: devices.Device = "cuda",
    vram: devices.VramBudget = "20%experts",
    ram: devices.RamBudget = "auto",
    lanes: devices.LaneMode = "auto",
    io: devices.Io = "auto",
    threads: devices.Threads = 0,
    ubatch: Annotated[int, typer.Option(min=16, help="Tokens of the chunk.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Chunks with and without a timeline.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens with and without one.")] = 9,
    out: Annotated[Path, typer.Option(help="Gets the timeline.")] = Path("timeline.json"),
    json_file: devices.JsonFile = None,
) -> None:
    """Record a timeline of the GPU engine."""
    devices.check_device(device)
    if device == "cpu":
        raise UsageError("--device cpu: the timeline is of a GPU")
    upload = devices.measure_bandwidths(device).upload
    context = max(2 * ubatch, ubatch + _FIRST_TOKENS + 2 * tokens)
    setting = Setting(
        device, vram, ram, context=context, ubatch=ubatch, io=io, threads=threads, lanes=lanes
    )
    with setting.load(store) as engine:
        clock = CudaClock(torch.device(device))
        found = measure(engine, device, clock, ubatch, rounds, tokens)
    shown = {name: work.median for name, work in found.items()}
    trace = chrome_trace({name: take.spans for name, take in shown.items()}, TRACKS)
    out.write_text(json.dumps(trace) + "\n")
    show(found, upload)
    error = max(take.error for take in shown.values()) * 1e6
    say(f"{out}: for https://ui.perfetto.dev; the GPU's times are right to {error:.0f} µs")
    works = {name: results(work, upload) for name, work in found.items()}
    emit(document("gpu_timeline", {"upload_bandwidth": upload, "works": works}), json_file)


if __name__ == "__main__":
    run_script(main)
