"""The most memory that a program has had at once; to be imported by the program itself.

`ru_maxrss` is no such thing: it begins with what the process had before it became this program,
which is what pytest holds.
"""

from pathlib import Path


def peak_bytes() -> int:
    """Resident memory at its largest so far, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(peak) * 1024
