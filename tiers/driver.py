"""Two calls of CUDA's driver that torch has not, or has at several times the cost."""

import ctypes
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

CopyAsync = Callable[[int, int, int, int], int]
"""(target, source, bytes, stream), addresses of the one address space → 0 or an error's number."""


@lru_cache
def _driver() -> Any:
    """The driver's library; None where there is none."""
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def device_address(address: int) -> int | None:
    """Where the device sees page-locked memory; None where it does not."""
    driver, found = _driver(), ctypes.c_uint64()
    if driver is None:
        return None
    code = driver.cuMemHostGetDevicePointer_v2(
        ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_uint(0)
    )
    return None if code else found.value


@lru_cache
def copy_async() -> CopyAsync | None:
    """Enqueues a copy in either direction: 5 µs where `Tensor.copy_` takes 13 to 21.

    Pageable memory is copied correctly, too, but the caller waits.
    """
    driver = _driver()
    if driver is None:
        return None
    copy: Any = driver.cuMemcpyAsync
    copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    copy.restype = ctypes.c_int
    found: CopyAsync = copy
    return found
