"""Seconds by the resource that takes them."""

from dataclasses import dataclass, fields

LABELS = {
    "drive": "the drive",
    "pcie": "PCIe",
    "cpu": "the CPU",
    "vram": "GPU memory",
    "gpu": "GPU compute",
    "overhead": "overhead of layers",
}


@dataclass(frozen=True, slots=True)
class Times:
    """What is waited for, one after the other: their sum is the time."""

    drive: float = 0.0
    pcie: float = 0.0
    cpu: float = 0.0
    vram: float = 0.0
    gpu: float = 0.0
    overhead: float = 0.0

    def __add__(self, other: "Times") -> "Times":
        names = [field.name for field in fields(self)]
        return Times(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def total(self) -> float:
        return sum(self.by_name().values())

    def by_name(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def limit(self) -> str:
        """The resource that takes the most, by its name."""
        named = self.by_name()
        return max(named, key=lambda name: named[name])
