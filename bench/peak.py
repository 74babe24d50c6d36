"""The most memory that a process has had.

Not `ru_maxrss`, which begins with what the process had before it became that program: that of
whoever started it. Imports nothing, so that it adds nothing to what it measures.
"""

from pathlib import Path


def peak_rss(pid: int | None = None) -> int:
    """The most memory this process, or that of `pid`, ever had resident, mapped files included.

    Raises:
        OSError, KeyError: there is no such process, or it has ended.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    rows = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(rows["VmHWM"].split()[0]) * 1024
