"""The int8 kernels of a store's codecs, made ready while the rest of the model loads."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from tierrun.engine.codecs.codec import find_codec, is_codec
from tierrun.engine.kernels.geometry import Geometry, packed_geometry
from tierrun.engine.kernels.int8 import obstacle
from tierrun.io.errors import StoreError

log = logging.getLogger(__name__)

PATIENCE = 1.5
"""Seconds after which it is said what takes so long: loading compiled code is over by then. And so
many between two lines of progress."""


class Int8Ready:
    """Compiles, or takes from disk, in a thread of its own; `wait` must follow."""

    def __init__(self, codecs: Iterable[str]) -> None:
        """`codecs` by name, dense ones and unknown ones among them."""
        found = dict.fromkeys(filter(None, map(_geometry, codecs)))
        self._error: BaseException | None = None
        self._steps, self._done = list(_steps(list(found))), 0
        self._thread = threading.Thread(target=self._run, name="tierrun-compile", daemon=True)
        if found:
            self._thread.start()

    def wait(self) -> None:
        """Until all is there; if that takes long, says so, and how far it is."""
        if self._thread.ident is None:
            return
        self._thread.join(PATIENCE)
        while self._thread.is_alive():
            done, steps = self._done, len(self._steps)
            log.warning(
                "compiling the CPU's kernels, once for this version and machine: %d of %d",
                done,
                steps,
            )
            self._thread.join(PATIENCE)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            for step in self._steps:
                step()
                self._done += 1
        except BaseException as error:  # to be raised where somebody waits
            self._error = error
        log.debug("the CPU's kernels were ready in %.1f s", time.perf_counter() - started)


def _steps(geometries: list[Geometry]) -> Iterator[Callable[[], None]]:
    """What is compiled, piece by piece; importing some of it compiles it."""
    for geometry in geometries:
        yield partial(_few, geometry)
        yield partial(_panels, geometry)
    yield from (_around_few, _around_panels, _of_tokens)


def _few(geometry: Geometry) -> None:
    from tierrun.engine.kernels import int8_tasks

    int8_tasks.tile_function(geometry)


def _panels(geometry: Geometry) -> None:
    from tierrun.engine.kernels import int8_tasks

    int8_tasks.panel_function(geometry)


def _around_few() -> None:
    from tierrun.engine.kernels import int8_tasks

    int8_tasks.linear()
    int8_tasks.prepare_rows()
    int8_tasks.tasks(0, 0)


def _around_panels() -> None:
    from tierrun.engine.kernels import int8_many, prompt_rows

    prompt_rows.compile_all()
    int8_many.linear()
    int8_many.tasks(0, 0)
    int8_many.prepare()


def _of_tokens() -> None:
    from tierrun.engine.kernels import token_ready

    token_ready.compile_all()


def _geometry(codec: str) -> Geometry | None:
    """Of some matrix in `codec`; None if there is no int8 kernel for it."""
    if not is_codec(codec):
        return None
    try:
        geometry = packed_geometry(find_codec(codec), (32, 256))
    except StoreError:  # levels that no kernel knows
        return None
    return None if obstacle(geometry) else geometry
