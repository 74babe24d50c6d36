"""PCIe links: generation and width in use, and whether a device could do more."""

from pathlib import Path
from typing import NamedTuple

from tierrun.tools.doctor.files import number, text
from tierrun.tools.doctor.line import Area, Line

_GENERATIONS = {"2.5": 1, "5.0": 2, "5": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6, "128.0": 7}
"""By GT/s, as sysfs writes them."""


AT_REST = "a GPU at rest slows its link down"
VIRTUAL = "a virtual machine may show another link than there is"


class Link(NamedTuple):
    """A PCIe link: now, what the device can, and which generation its slot can; None: not told.

    `excuse`: why less than the device can do is no finding.
    """

    generation: int | None
    width: int | None
    most_generation: int | None
    most_width: int | None
    slot_generation: int | None = None
    excuse: str | None = None


def sysfs_link(device: Path) -> Link:
    """The link of a PCI device, by its (resolved) directory in /sys; the port above is its slot."""
    return Link(
        _generation(device / "current_link_speed"),
        _width(device / "current_link_width"),
        _generation(device / "max_link_speed"),
        _width(device / "max_link_width"),
        _generation(device.parent / "max_link_speed"),
    )


def _generation(path: Path) -> int | None:
    """`16.0 GT/s PCIe` → 4."""
    return _GENERATIONS.get((text(path) or "").partition(" ")[0])


def _width(path: Path) -> int | None:
    """Lanes; 0 and 255 mean that the link is down or not told."""
    found = number(path)
    return found if found is not None and 0 < found <= 32 else None


def link_line(area: Area, name: str, link: Link) -> Line:
    """Whether the link is as good as the device and its slot."""
    if link.generation is None or link.width is None:
        return area.unknown(name, "its PCIe link is not shown here")
    value = f"PCIe gen {link.generation} x{link.width}"
    if link.most_generation is None or link.most_width is None:
        return area.ok(name, f"{value}; what the device could do is not shown here")
    most = f"gen {link.most_generation} x{link.most_width}"
    slower, narrower = link.generation < link.most_generation, link.width < link.most_width
    if not (slower or narrower):
        return area.ok(name, f"{value}, all that the device can do")
    if slower and not narrower and link.slot_generation == link.generation:
        return area.ok(name, f"{value}, all that its slot allows (the device: {most})")
    if link.excuse is not None:
        return area.ok(name, f"{value}, {most} at most: {link.excuse}")
    return area.warn(
        name,
        f"{value}: degraded, the device can do {most}",
        "seat it again, without riser or cable, in a slot of its own; look in the firmware's "
        "settings for the slot's generation and for lanes that are shared",
    )
