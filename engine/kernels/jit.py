"""numba's `njit` and `cfunc`, with a cache on disk that sees every change of the kernels' sources.

numba keeps compiled code under a stamp of the one file that a function is in. Ours inline
functions, intrinsics and constants of other files: where only such a file changed, stale code would
run. Here the stamp is a digest of all that kernels are made of. Kernels import both from here,
never from numba (a test says so).
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numba import cfunc, njit
from numba.core.caching import CacheImpl

__all__ = ["cfunc", "njit"]

KERNELS = Path(__file__).resolve().parent
CODECS = KERNELS.parent / "codecs"


def sources() -> Iterator[Path]:
    """What compiled code can depend on, beside numba itself and the processor."""
    for directory in (CODECS, KERNELS):
        yield from sorted(directory.glob("*.py"))


@functools.cache
def digest() -> str:
    """Of names and contents of all `sources`."""
    made = hashlib.sha256()
    for path in sources():
        content = path.read_bytes()
        made.update(f"{path.name} {len(content)}\n".encode() + content)
    return made.hexdigest()


class KernelLocator:
    """Where numba itself would keep the code of a kernel, with our stamp.

    One of numba's cache locators (`numba.core.caching`): for functions of this directory only.
    """

    def __init__(self, place: Any) -> None:
        self._place = place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place, name)

    def get_source_stamp(self) -> tuple[object, str]:
        """That of numba, and ours."""
        return self._place.get_source_stamp(), digest()

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> "KernelLocator | None":
        """None for files that are not ours, which numba then places without us."""
        if Path(file).resolve().parent != KERNELS:
            return None
        for numbas in _NUMBAS:
            place = numbas.from_function(function, file)
            if place is not None:
                return cls(place)
        return None


_NUMBAS = list(CacheImpl._locator_classes)
CacheImpl._locator_classes = [KernelLocator, *_NUMBAS]
