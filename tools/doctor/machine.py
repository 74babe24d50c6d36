"""The machine as a whole."""

from pathlib import Path
from typing import NamedTuple

from tierrun.tools.doctor.files import text
from tierrun.tools.doctor.line import Area, Line
from tierrun.tools.doctor.processor import in_virtual_machine

MACHINE = Area("machine")


class Kernel(NamedTuple):
    """What uname(2) says of the kernel."""

    name: str
    release: str
    architecture: str


def system_line(root: Path, kernel: Kernel) -> Line:
    """Distribution, kernel, and what the machine says it is."""
    product = text(root / "sys/class/dmi/id/product_name")
    parts = [_distribution(root), f"{kernel.name} {kernel.release}", kernel.architecture, product]
    virtual = "virtual machine" if in_virtual_machine(root) else None
    return MACHINE.ok("system", ", ".join(filter(None, [*parts, virtual])))


def _distribution(root: Path) -> str | None:
    for line in (text(root / "etc/os-release") or "").splitlines():
        name, _, value = line.partition("=")
        if name == "PRETTY_NAME":
            return value.strip().strip("\"'")
    return None
