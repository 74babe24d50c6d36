"""What reading a drive in different ways was measured to give, and what follows from it.

A profile is kept in the user's cache, one file per set of drives, with what it was measured on: a
profile of another drive, GPU or kvikio is measured anew.
"""

import json
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from tierrun.io.drives import Drive
from tierrun.io.reader import Measured
from tierrun.io.whole import write_whole

log = logging.getLogger(__name__)

LEAST_GAIN = 1.05
"""By how much gds has to be faster: less is within what two measurements differ by."""


class Way(NamedTuple):
    """How bytes come from the drive (`direct`, `staged`, `gds`) to where (`host`, `device`)."""

    reader: str
    target: str

    @property
    def label(self) -> str:
        return f"{self.reader} → {'VRAM' if self.target == 'device' else 'RAM'}"


DIRECT, GDS = Way("direct", "host"), Way("gds", "host")
STAGED, GDS_DEVICE = Way("staged", "device"), Way("gds", "device")
WAYS = (DIRECT, GDS, STAGED, GDS_DEVICE)


class Cell(NamedTuple):
    """Bytes per second of reads of `nbytes` each, `depth` at once."""

    way: Way
    nbytes: int
    depth: int
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What a profile is true for."""

    drives: str
    gpu: str
    kvikio: str
    mode: str

    def difference(self, other: "Setting") -> str | None:
        """What is not as in `other`, in a clause; None where nothing is."""
        for name in (field.name for field in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {theirs!r} then, {mine!r} now"
        return None


@dataclass(frozen=True, slots=True)
class Profile:
    """The cells measured in a setting."""

    setting: Setting
    cells: tuple[Cell, ...]

    @property
    def sizes(self) -> frozenset[int]:
        return frozenset(cell.nbytes for cell in self.cells)

    def typical(self, way: Way) -> float | None:
        """The geometric mean over sizes and depths: a way that is twice as fast there counts the
        same wherever it is."""
        logarithms = [math.log(cell.bandwidth) for cell in self.cells if cell.way == way]
        return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None

    def fastest(self, target: str) -> float | None:
        """The most that any way to `target` has given, at any size and depth."""
        return max((c.bandwidth for c in self.cells if c.way.target == target), default=None)

    def joined(self, cells: Iterable[Cell]) -> "Profile":
        """This and `cells`, which stand in for older ones of their sizes."""
        fresh = tuple(cells)
        sizes = {cell.nbytes for cell in fresh}
        kept = tuple(cell for cell in self.cells if cell.nbytes not in sizes)
        return Profile(self.setting, kept + fresh)

    def stand_in(self, nbytes: int) -> int | None:
        """The measured size next to `nbytes`; None where it is not within a factor of two."""
        distance = {size: abs(math.log2(size / nbytes)) for size in self.sizes}
        nearest = min(distance, key=lambda size: distance[size], default=None)
        return nearest if nearest is not None and distance[nearest] <= 1 else None

    def restricted(self, sizes: Iterable[int]) -> "Profile":
        """The cells that stand in for records of `sizes`: what concerns one store."""
        wanted = {self.stand_in(nbytes) for nbytes in sizes}
        return Profile(self.setting, tuple(c for c in self.cells if c.nbytes in wanted))

    def to_json(self) -> str:
        cells = [[*cell.way, *cell[1:]] for cell in self.cells]
        return json.dumps({"setting": asdict(self.setting), "cells": cells}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "Profile":
        """Raises ValueError, KeyError or TypeError: not a profile."""
        document = json.loads(text)
        setting = Setting(**{name: str(value) for name, value in document["setting"].items()})
        return Profile(setting, tuple(_parse_cell(*entry) for entry in document["cells"]))


def _parse_cell(reader: str, target: str, nbytes: int, depth: int, bandwidth: float) -> Cell:
    way = Way(reader, target)
    if way not in WAYS or nbytes <= 0 or depth <= 0 or not 0 < bandwidth < math.inf:
        raise ValueError("a cell out of range")
    return Cell(way, int(nbytes), int(depth), float(bandwidth))


def choose_paths(profile: Profile) -> Measured:
    """The faster way to each destination; gds only where it is faster by `LEAST_GAIN`."""
    to_host, why_host = _faster(profile, DIRECT, GDS)
    to_device, why_device = _faster(profile, STAGED, GDS_DEVICE)
    mode = profile.setting.mode
    return Measured(to_host, to_device, f"to RAM {why_host}; to VRAM {why_device}; {mode}")


def _faster(profile: Profile, usual: Way, gds: Way) -> tuple[str, str]:
    before, after = profile.typical(usual), profile.typical(gds)
    if before is None or after is None:
        missing = usual if before is None else gds
        return usual.reader, f"{usual.reader}, {missing.reader} was not measured"
    chosen = gds if after >= LEAST_GAIN * before else usual
    figures = f"{gds.reader} {after / 1e9:.2f}, {usual.reader} {before / 1e9:.2f} GB/s"
    return chosen.reader, f"{chosen.reader} ({figures})"


class ProfileFile:
    """Where the profile of some drives is kept.

    Nothing about it stops a run: what cannot be read is measured again, what cannot be written is
    said and done without.
    """

    def __init__(self, drives: Iterable[Drive]) -> None:
        numbers = "+".join(drive.number.replace(":", "-") for drive in drives)
        self._path = cache_directory() / f"drive-{numbers}.json"

    def read(self) -> Profile | None:
        """What is kept; None where nothing is, or nothing that can be read."""
        try:
            return Profile.from_json(self._path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be used (%s): measuring again", self._path, error)
            return None

    def write(self, profile: Profile) -> None:
        """Keep `profile`, whole or not at all."""
        try:
            write_whole(self._path, profile.to_json())
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): every run measures the drive again",
                self._path,
                error.strerror or error,
            )


def cache_directory() -> Path:
    """Where profiles are kept between processes."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "tierrun" / "drives"
