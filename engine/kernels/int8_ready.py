"""The int8 kernels of a store's codecs, made ready while the rest of the model loads."""

import logging
import threading
import time
from collections.abc import Iterable

from tierrun.engine.codecs.codec import find_codec, is_codec
from tierrun.engine.kernels.geometry import Geometry, packed_geometry
from tierrun.engine.kernels.int8 import obstacle
from tierrun.io.errors import StoreError

log = logging.getLogger(__name__)

PATIENCE = 1.5
"""Seconds after which it is said what takes so long: loading compiled code is over by then."""


class Int8Ready:
    """Compiles, or takes from disk, in a thread of its own; `wait` must follow."""

    def __init__(self, codecs: Iterable[str]) -> None:
        """`codecs` by name, dense ones and unknown ones among them."""
        found = dict.fromkeys(filter(None, map(_geometry, codecs)))
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(list(found),), name="tierrun-compile", daemon=True
        )
        if found:
            self._thread.start()

    def wait(self) -> None:
        """Until all is there; says so once if that takes long."""
        if self._thread.ident is None:
            return
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            log.warning("compiling the CPU's kernels, once for this version and machine")
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, geometries: list[Geometry]) -> None:
        started = time.perf_counter()
        try:
            from tierrun.engine.kernels import int8_many, int8_tasks, token_ready

            for geometry in geometries:
                int8_tasks.tile_function(geometry)
                int8_tasks.panel_function(geometry)
            for module in (int8_tasks, int8_many):
                module.linear()
                module.tasks(0, 0)
            int8_many.prepare()
            token_ready.compile_all()
        except BaseException as error:  # to be raised where somebody waits
            self._error = error
        log.debug("the CPU's kernels were ready in %.1f s", time.perf_counter() - started)


def _geometry(codec: str) -> Geometry | None:
    """Of some matrix in `codec`; None if there is no int8 kernel for it."""
    if not is_codec(codec):
        return None
    try:
        geometry = packed_geometry(find_codec(codec), (32, 256))
    except StoreError:  # levels that no kernel knows
        return None
    return None if obstacle(geometry) else geometry
