"""One chunk of a prompt and one token of decode as a timeline that Perfetto opens.

    python -m tierrun.bench.gpu_timeline STORE --vram 20%experts --out timeline.json

Open the file at https://ui.perfetto.dev. The device's tracks (kernels, copies) are the profiler's,
the host's (reads, the CPU lane, the model's thread) our own. The table says how busy the device
and the bus were, and how much of the copying lay behind kernels.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table

from tierrun.bench import devices
from tierrun.bench.devices import Setting, say, synchronise
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.bench.stream import token_stream
from tierrun.engine.engine import Engine
from tierrun.io.errors import UsageError
from tierrun.io.timeline import Timeline

DEVICE_CATEGORIES = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "kernels"}
_UPLOAD = "HtoD"
_TAKES = 3


class Event(NamedTuple):
    """On one track of one process of the timeline; microseconds of the wall clock."""

    process: str
    track: str
    name: str
    start: float
    duration: float
    arguments: dict[str, Any]


class Recorded(NamedTuple):
    """One piece of work: its wall time in microseconds, and everything that happened in it."""

    wall: float
    events: list[Event]


def recorded(work: Callable[[], object], device: str) -> Recorded:
    """Run `work` under the profiler."""
    clock = time.time_ns() / 1e3 - time.perf_counter() * 1e6
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with (
        torch.profiler.profile(activities=activities, acc_events=True) as profiler,
        Timeline() as timeline,
    ):
        started = time.perf_counter()
        work()
        synchronise(device)
        ended = time.perf_counter()
    with TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = list(_device_events(trace))
    for track, name, start, end, _ in timeline.spans:
        events.append(Event("host", track, name, start * 1e6 + clock, (end - start) * 1e6, {}))
    first, last = started * 1e6 + clock, ended * 1e6 + clock
    events.append(Event("host", "work", "all of it", first, last - first, {}))
    return Recorded(last - first, events)


def _device_events(trace: dict[str, Any]) -> Iterable[Event]:
    base = trace.get("baseTimeNanoseconds", 0) / 1e3
    for event in trace["traceEvents"]:
        track = DEVICE_CATEGORIES.get(event.get("cat", ""))
        if track is None or event.get("ph") != "X":
            continue
        known, name = event.get("args", {}), event["name"]
        nbytes = {"bytes": known["bytes"]} if "bytes" in known else {}
        stream = f"{track}, stream {known.get('stream', 0)}"
        yield Event("device", stream, name, event["ts"] + base, event["dur"], nbytes)


class Figures(NamedTuple):
    """Shares of the wall time, bytes per second while uploading, and the share that lay hidden."""

    wall_ms: float
    kernels_busy: float
    uploads_busy: float
    upload_bytes: int
    upload_rate: float
    uploads_behind_kernels: float


def figures(work: Recorded) -> Figures:
    """From the device's events."""
    device = [event for event in work.events if event.process == "device"]
    uploads = [event for event in device if _UPLOAD in event.name]
    kernels = merged([_interval(event) for event in device if event.track.startswith("kernels")])
    busy = merged([_interval(event) for event in uploads])
    taken = length(busy)
    nbytes = sum(int(event.arguments.get("bytes", 0)) for event in uploads)
    return Figures(
        wall_ms=work.wall / 1e3,
        kernels_busy=length(kernels) / work.wall,
        uploads_busy=taken / work.wall,
        upload_bytes=nbytes,
        upload_rate=nbytes / taken * 1e6 if taken else 0.0,
        uploads_behind_kernels=length(common(busy, kernels)) / taken if taken else 0.0,
    )


Interval = tuple[float, float]


def _interval(event: Event) -> Interval:
    return event.start, event.start + event.duration


def merged(intervals: Sequence[Interval]) -> list[Interval]:
    """Their union, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def common(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What two unions share."""
    found, i, j = list[Interval](), 0, 0
    while i < len(some) and j < len(others):
        start, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if start < end:
            found.append((start, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    """What they cover together."""
    return sum(end - start for start, end in intervals)


def chrome_trace(named: dict[str, Recorded]) -> dict[str, Any]:
    """The JSON that Perfetto reads, every piece of work a group of processes."""
    rows: list[dict[str, Any]] = []
    numbers: dict[tuple[str, ...], int] = {}
    first = min(event.start for work in named.values() for event in work.events)
    for title, work in named.items():
        for event in sorted(work.events, key=lambda event: event.start):
            process = _number(rows, numbers, "process_name", f"{title}: {event.process}")
            thread = _number(rows, numbers, "thread_name", event.track, process)
            row = {"ph": "X", "name": event.name, "pid": process, "tid": thread}
            times = {"ts": event.start - first, "dur": event.duration}
            rows.append(row | times | {"args": event.arguments})
    return {"displayTimeUnit": "ms", "traceEvents": rows}


def _number(
    rows: list[dict[str, Any]],
    numbers: dict[tuple[str, ...], int],
    kind: str,
    name: str,
    process: int | None = None,
) -> int:
    """The number of a process, or of a track of one; named in `rows` the first time."""
    key = (kind, str(process), name)
    if key not in numbers:
        numbers[key] = len(numbers) + 1
        process_number = numbers[key] if process is None else process
        row = {"ph": "M", "name": kind, "pid": process_number, "args": {"name": name}}
        rows.append(row if process is None else row | {"tid": numbers[key]})
    return numbers[key]


def measure(engine: Engine, device: str, prompt: int) -> dict[str, Recorded]:
    """A chunk, then a token; each is recorded again and again, and only the last time counts:
    the profiler takes a second when it first sees a device, and loses what happens meanwhile."""
    vocabulary = engine.model.config.get_text_config().vocab_size
    stream = token_stream((_TAKES + 1) * prompt + 32 + _TAKES, vocabulary)
    session, chunk, one_token = engine.session(), list[Recorded](), list[Recorded]()
    for first in range(0, (_TAKES + 1) * prompt, prompt):
        session.reset()
        tokens = stream[first : first + prompt]
        chunk.append(recorded(partial(session.prefill, tokens), device))
    rest = stream[(_TAKES + 1) * prompt :]
    for token in rest[:32]:
        session.prefill([token])
    for token in rest[32:]:
        one_token.append(recorded(partial(session.prefill, [token]), device))
    return {"prefill": chunk[-1], "decode": one_token[-1]}


def table(found: dict[str, Figures], upload: float) -> Table:
    """One column per piece of work."""
    made = Table(title=f"pinned memory to the device: {upload / 1e9:.1f} GB/s at best")
    made.add_column("")
    for name in found:
        made.add_column(name, justify="right")
    rows: tuple[tuple[str, Callable[[Figures], str]], ...] = (
        ("wall time, ms", lambda f: f"{f.wall_ms:.2f}"),
        ("kernels running, % of it", lambda f: f"{100 * f.kernels_busy:.1f}"),
        ("uploads running, % of it", lambda f: f"{100 * f.uploads_busy:.1f}"),
        ("uploaded, MB", lambda f: f"{f.upload_bytes / 1e6:.1f}"),
        ("GB/s while uploading", lambda f: f"{f.upload_rate / 1e9:.1f}"),
        ("uploaded by wall time, % of the best", lambda f: f"{_share(f, upload):.1%}"),
        ("uploads behind kernels, %", lambda f: f"{100 * f.uploads_behind_kernels:.1f}"),
    )
    for label, text in rows:
        made.add_row(label, *(text(one) for one in found.values()))
    return made


def _share(found: Figures, upload: float) -> float:
    return found.upload_bytes / (found.wall_ms / 1e3) / upload


def main(
    store: Annotated[Path, typer.Argument(help="The store's directory.")],
    device: devices.Device = "cuda",
    vram: devices.VramBudget = "20%experts",
    ram: devices.RamBudget = "auto",
    lanes: devices.LaneMode = "gpu",
    io: devices.Io = "auto",
    threads: devices.Threads = 0,
    prompt: Annotated[int, typer.Option(min=16, help="Tokens of the chunk.")] = 2048,
    out: Annotated[Path, typer.Option(help="Gets the timeline.")] = Path("timeline.json"),
    json_file: devices.JsonFile = None,
) -> None:
    """Record a timeline of the GPU engine."""
    devices.check_device(device)
    if device == "cpu":
        raise UsageError("--device cpu: the timeline is of a GPU")
    upload = devices.measure_bandwidths(device).upload
    setting = Setting(
        device, vram, ram, context=4 * prompt, ubatch=prompt, io=io, threads=threads, lanes=lanes
    )
    with setting.load(store) as engine:
        found = measure(engine, device, prompt)
    shown = {name: figures(work) for name, work in found.items()}
    open_console().print(table(shown, upload))
    out.write_text(json.dumps(chrome_trace(found)) + "\n")
    say(f"{out}: open it at https://ui.perfetto.dev")
    rows = {name: one._asdict() | {"share": _share(one, upload)} for name, one in shown.items()}
    emit(document("gpu_timeline", {"upload_bandwidth": upload, "figures": rows}), json_file)


if __name__ == "__main__":
    run_script(main)
