"""The whole examination: every area at once, none of which can hold up or break the others."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Thread

import tierrun
from tierrun.io.drives import drives_of
from tierrun.tools.doctor.child import Child
from tierrun.tools.doctor.compiling import compiling_lines
from tierrun.tools.doctor.directory import directory_lines, profile_line
from tierrun.tools.doctor.facts import Cuda, Imports
from tierrun.tools.doctor.gpu import GPU, gpu_lines, nvidia_gpus
from tierrun.tools.doctor.line import Area, Line, Report
from tierrun.tools.doctor.machine import MACHINE, Kernel, system_line
from tierrun.tools.doctor.memory import MEMORY, lock_limit, memory_lines
from tierrun.tools.doctor.processor import PROCESSOR, processor_lines
from tierrun.tools.doctor.software import SOFTWARE, software_lines

log = logging.getLogger(__name__)

_TOGETHER = Area("all directories")

_CHILD_SECONDS, _SECONDS = 14.0, 17.0
"""For a child, and for everything: less than the twenty that a user is promised."""


class Examination(Thread):
    """One area, in a thread that nobody has to wait for: a directory of a server that is gone
    holds up whoever looks at it."""

    def __init__(self, area: Area, work: Callable[[], list[Line]]) -> None:
        super().__init__(name=f"doctor {area.name}", daemon=True)
        self._area, self._work = area, work
        self._lines: list[Line] | None = None
        self.start()

    def run(self) -> None:
        """See `Thread`."""
        try:
            self._lines = self._work()
        except Exception as error:  # what is examined may be broken in any way; the doctor is not
            log.debug("examining %s", self._area.name, exc_info=True)
            self._lines = [self._area.unknown("examination", f"it failed: {error!r}")]

    def lines(self, until: float) -> list[Line]:
        """What was found by the time `until`, of time.perf_counter."""
        self.join(max(0.0, until - time.perf_counter()))
        if self._lines is None:
            return [self._area.unknown("examination", "it did not end in time")]
        return self._lines


def examine(directories: Sequence[Path], root: Path = Path("/")) -> Report:
    """Look at everything that matters to tierrun, and at `directories` for stores.

    Takes less than 20 seconds, and raises nothing for what it finds.
    """
    started = time.perf_counter()
    until = started + _SECONDS
    with (
        Child("tierrun.tools.doctor.probe", Cuda, _CHILD_SECONDS) as cuda,
        Child("tierrun.tools.doctor.imports", Imports, _CHILD_SECONDS) as imports,
    ):
        examinations = [
            Examination(MACHINE, lambda: [system_line(root, _kernel())]),
            Examination(PROCESSOR, lambda: processor_lines(root, os.sched_getaffinity(0))),
            Examination(MEMORY, lambda: memory_lines(root, lock_limit())),
            Examination(GPU, lambda: gpu_lines(root, cuda.answer())),
            Examination(SOFTWARE, software_lines),
            Examination(SOFTWARE, partial(_compiling, root, imports)),
            *_directories(directories, root),
        ]
        lines = [line for one in examinations for line in one.lines(until)]
    return Report.of(lines, tierrun.__version__, time.perf_counter() - started)


def _kernel() -> Kernel:
    found = os.uname()
    return Kernel(found.sysname, found.release, found.machine)


def _compiling(root: Path, imports: Child[Imports]) -> list[Line]:
    return compiling_lines(imports.answer(), bool(nvidia_gpus(root)))


def _directories(directories: Sequence[Path], root: Path) -> list[Examination]:
    """One for each, and one for all together, over which a store's experts are dealt."""
    each = [Examination(Area(str(one)), partial(directory_lines, one, root)) for one in directories]
    return [*each, Examination(_TOGETHER, partial(_together, directories))]


def _together(directories: Sequence[Path]) -> list[Line]:
    """Nothing where they share a drive, whose profile each has shown."""
    there = [one for one in directories if one.is_dir()]
    return [profile_line(_TOGETHER, there)] if len(drives_of(there)) > 1 else []
