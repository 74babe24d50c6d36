"""One run of an arm of `tierrun bench peers`: a process, in a memory cgroup if there is a cap.

Beside what it prints, its peak of memory and how busy the machine was with anything else are
noted: where every core has a thread that waits for the others, a little of that costs much.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, NamedTuple

from tierrun.bench.cgroup import CgroupUsage, MemoryCgroup, drop_caches, memory_cgroup
from tierrun.bench.peak import peak_rss
from tierrun.bench.peers_setting import Setting
from tierrun.io.errors import TierrunError
from tierrun.io.extent import format_bytes

_POLL_SECONDS = 0.05


class Killed(Exception):
    """An arm that did not live: its message says why."""


class Output(NamedTuple):
    """Of a process: what it printed, its peak of memory, its seconds, and how many cores others
    kept busy meanwhile."""

    text: str
    peak_bytes: int
    seconds: float
    others_cores: float = 0.0


class _Ended(NamedTuple):
    """Exit code (minus the signal), the most resident memory, seconds of CPU and of the clock."""

    code: int
    peak_bytes: int
    busy: float
    seconds: float


def run_capped(name: str, command: Sequence[str], setting: Setting) -> Output:
    """Run `command` in a cgroup of the setting's memory, if it has one, from a cold page cache.

    Raises:
        Killed: it had not enough memory, or time.
        TierrunError: it failed in any other way.
    """
    if setting.memory is not None or os.geteuid() == 0:
        drop_caches()
    offload = setting.directory / "offload"
    capped = nullcontext() if setting.memory is None else memory_cgroup(setting.memory)
    try:
        with (
            capped as cgroup,
            tempfile.TemporaryFile("w+") as output,
            tempfile.TemporaryFile("w+") as errors,
        ):
            return _run(name, command, setting, cgroup, output, errors)
    finally:
        shutil.rmtree(offload, ignore_errors=True)


def _run(
    name: str,
    command: Sequence[str],
    setting: Setting,
    cgroup: MemoryCgroup | None,
    output: IO[str],
    errors: IO[str],
) -> Output:
    wrapped, busy = command if cgroup is None else cgroup.command(command), _busy_seconds()
    process = subprocess.Popen(wrapped, stdout=output, stderr=errors)
    try:
        ended = _await(process, setting.seconds)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    usage = cgroup.usage() if cgroup is not None else None
    if ended.code:
        raise _failure(name, ended.code, usage, setting, _last_line(errors))
    others = max(0.0, _busy_seconds() - busy - ended.busy) / ended.seconds
    peak = ended.peak_bytes if usage is None else usage.peak_bytes
    return Output(_text(output), peak, ended.seconds, others)


def _await(process: "subprocess.Popen[bytes]", limit: float) -> _Ended:
    """Until it ends. Its memory is looked at while it lives: what `wait4` says of it begins with
    what this process had."""
    started, peak = time.perf_counter(), 0
    while True:
        peak = max(peak, _peak_bytes(process.pid))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - started
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return _Ended(process.returncode, peak, usage.ru_utime + usage.ru_stime, seconds)
        if seconds > limit:
            raise Killed(f"not done after {limit:.0f} s (--timeout)")
        time.sleep(_POLL_SECONDS)


def _peak_bytes(pid: int) -> int:
    """0 once the process has given its memory back."""
    try:
        return peak_rss(pid)
    except (OSError, KeyError):
        return 0


def _busy_seconds() -> float:
    """Of all cores together, since the machine started."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _failure(
    name: str, code: int, usage: CgroupUsage | None, setting: Setting, word: str
) -> Exception:
    if code == -signal.SIGKILL or (usage is not None and usage.killed):
        cap = f" in {format_bytes(setting.memory)}" if setting.memory else ""
        return Killed(f"killed for want of memory{cap}")
    if code < 0:
        return TierrunError(f"{name} crashed ({signal.Signals(-code).name}): {word}")
    return TierrunError(f"{name} ended with {code}: {word}")


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _last_line(errors: IO[str]) -> str:
    return (_text(errors).strip().splitlines()[-1:] or ["no message"])[0]
