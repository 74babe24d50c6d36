"""How much memory has to be gone through so that it is memory, and no cache, that is measured."""

from pathlib import Path

from tierrun.io.errors import UsageError
from tierrun.io.extent import parse_bytes

_CPUS = Path("/sys/devices/system/cpu")
_LEAST, _MOST = 256 << 20, 4 << 30


def cache_bytes(cpus: Path = _CPUS) -> int:
    """The last-level caches of all processors together; 0 where the system does not say."""
    found = dict[str, int]()
    for index in cpus.glob("cpu[0-9]*/cache/index3"):
        try:
            shared = (index / "shared_cpu_list").read_text().strip()
            found[shared] = parse_bytes((index / "size").read_text().strip() + "iB")
        except (OSError, UsageError):
            continue
    return sum(found.values())


def more_than_cached(cache: int, times: int) -> int:
    """Bytes to go through in turn: so many times a last-level cache of `cache` bytes, from 256 MiB
    to 4 GiB."""
    return max(_LEAST, min(_MOST, times * cache))
