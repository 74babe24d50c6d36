"""What nvidia-smi says about the GPUs' PCIe links."""

import re
import subprocess
from collections.abc import Iterator

from tierrun.tools.doctor.facts import SmiLink

_FIELDS = (
    "pci.bus_id,pcie.link.gen.current,pcie.link.width.current,pcie.link.gen.max,pcie.link.width.max"
)
_COMMAND = ("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
_SECONDS = 6.0
_ADDRESS = re.compile(r"([0-9a-f]+):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")


def query_links(loaded: bool) -> list[SmiLink]:
    """A link for each GPU; none where nvidia-smi is missing, fails or is slow. `loaded`: whether
    copies are under way."""
    try:
        done = subprocess.run(
            _COMMAND, capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return list(parse_links(done.stdout, loaded))


def parse_links(output: str, loaded: bool) -> Iterator[SmiLink]:
    """The rows of nvidia-smi's CSV; what is `[N/A]` is None."""
    for row in output.splitlines():
        address, *numbers = (cell.strip() for cell in row.split(","))
        place = plain_address(address)
        if place is None or len(numbers) != 4:
            continue
        generation, width, most_generation, most_width = map(_positive, numbers)
        yield SmiLink(
            address=place,
            generation=generation,
            width=width,
            most_generation=most_generation,
            most_width=most_width,
            loaded=loaded,
        )


def plain_address(address: str) -> str | None:
    """`00000000:41:00.0` → `0000:41:00.0`, as in /sys."""
    match = _ADDRESS.fullmatch(address.lower())
    return f"{int(match[1], 16):04x}:{match[2]}" if match else None


def _positive(cell: str) -> int | None:
    return int(cell) if re.fullmatch(r"[0-9]{1,3}", cell) and int(cell) > 0 else None
