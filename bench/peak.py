"""The most memory that this process has had.

Not `ru_maxrss`, which begins with what the process had before it became this program: that of
whoever started it. Imports nothing, so that it adds nothing to what it measures.
"""

from pathlib import Path


def peak_rss() -> int:
    """The most memory this process ever had resident, mapped files included."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmHWM"].split()[0]) * 1024
