"""What a machine does in a second, as far as a prediction needs it, and how a user writes that."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from tierrun.io.errors import UsageError


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second, but for `…_flops` (products) and `latency`, `overhead` (seconds).

    Reading m experts takes `latency` and their bytes at `drive`. `cpu` and `cpu_resident` are what
    the CPU's kernels make of experts and resident weights as they are stored, a token at a time;
    `in_place` is what a GPU makes of experts that RAM has; `overhead` what a layer takes for one
    token beside its weights and reads. What the computing device does not need is 0.
    """

    drive: float
    latency: float
    overhead: float
    memory: float = 0.0
    cpu: float = 0.0
    cpu_resident: float = 0.0
    cpu_flops: float = 0.0
    pcie: float = 0.0
    in_place: float = 0.0
    vram: float = 0.0
    gpu_flops: float = 0.0

    @property
    def has_gpu(self) -> bool:
        return self.vram > 0


class Kind(NamedTuple):
    """How numbers of a kind are written: an example, and its units."""

    example: str
    units: dict[str, float]


_BANDWIDTH = Kind("7GB/s", {"MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12})
_FLOPS = Kind("900TFLOP/s", {"GFLOP/s": 1e9, "TFLOP/s": 1e12})
_SECONDS = Kind("100us", {"ns": 1e-9, "us": 1e-6, "ms": 1e-3})

KINDS = {
    "drive": _BANDWIDTH,
    "latency": _SECONDS,
    "memory": _BANDWIDTH,
    "cpu": _BANDWIDTH,
    "cpu_resident": _BANDWIDTH,
    "cpu_flops": _FLOPS,
    "overhead": _SECONDS,
    "pcie": _BANDWIDTH,
    "in_place": _BANDWIDTH,
    "vram": _BANDWIDTH,
    "gpu_flops": _FLOPS,
}
"""Name in `--assume` (and in `Rates`) → how it is written."""

_NUMBER = re.compile(r"^(\d+(?:\.\d+)?)\s*([A-Za-z/]+)$")


def parse_assumed(text: str | None) -> dict[str, float]:
    """`drive=7GB/s,pcie=25GB/s` → numbers by name.

    Raises:
        UsageError: a name or a number that is not understood, or one given twice.
    """
    found: dict[str, float] = {}
    for part in (text or "").split(",") if text is not None else ():
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in KINDS:
            raise UsageError(
                f"--assume {part!r}: write NAME=NUMBER with commas between; the names are "
                f"{', '.join(KINDS)}"
            )
        if name in found:
            raise UsageError(f"--assume gives {name} twice")
        found[name] = _number(name, value)
    return found


def _number(name: str, text: str) -> float:
    kind, match = KINDS[name], _NUMBER.match(text)
    units = {unit.lower(): factor for unit, factor in kind.units.items()}
    if match is None or match[2].lower() not in units or float(match[1]) <= 0:
        raise UsageError(
            f"--assume {name}={text}: write a number above 0 with its unit "
            f"({', '.join(kind.units)}), like {name}={kind.example}"
        )
    return float(match[1]) * units[match[2].lower()]
