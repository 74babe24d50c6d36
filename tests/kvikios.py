"""A kvikio made of Python: its signatures, and what it does as far as tierrun relies on it.

As in kvikio 26.10 (cufile.py, defaults.py, cufile_driver.py): errors are
RuntimeError, settings are read and written by name, files open without errno in what they raise.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


class CompatMode(Enum):
    OFF = 0
    ON = 1
    AUTO = 2


@dataclass
class FakeKvikio:
    """What the module does, for tests to set: `fails` says of a read whether it does."""

    fails: Callable[[int, int], bool] = lambda offset, size: False
    compat: bool = False
    driver: bool = True
    version: str = "26.10.0"
    settings: dict[str, Any] = field(default_factory=dict)
    reads: list[tuple[int, int, int | None]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FakeKvikio":
        """Become the module `kvikio`."""
        kvikio, defaults = ModuleType("kvikio"), ModuleType("kvikio.defaults")
        driver = ModuleType("kvikio.cufile_driver")
        members: dict[ModuleType, dict[str, Any]] = {
            kvikio: {
                "__version__": self.version,
                "__path__": [],
                "CompatMode": CompatMode,
                "CuFile": self._open,
                "defaults": defaults,
                "cufile_driver": driver,
            },
            defaults: {"set": self.settings.update, "is_compat_mode_preferred": self._is_compat},
            driver: {"get": self._driver_property},
        }
        for module, values in members.items():
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return self

    def _open(self, file: Path | str, flags: str = "r") -> "_CuFile":
        return _CuFile(self, file, flags)

    def _is_compat(self) -> bool:
        return self.compat

    def _driver_property(self, name: str) -> bool:
        assert name == "is_gds_available"
        if self.compat:
            raise RuntimeError("KvikIO not compiled with cuFile.h")
        return self.driver


class _CuFile:
    def __init__(self, kvikio: FakeKvikio, file: Path | str, flags: str) -> None:
        assert flags == "r"
        self._kvikio = kvikio
        try:
            self._file = open(file, "rb", buffering=0)
        except OSError:
            raise RuntimeError(f"KvikIO failure at: file_utils.cpp:62: open {file}") from None

    def __enter__(self) -> "_CuFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def pread(
        self, buf: Any, size: int | None = None, file_offset: int = 0, task_size: int | None = None
    ) -> "_IOFuture":
        target = _writable(buf)
        nbytes = len(target) if size is None else size
        if nbytes > len(target):
            raise ValueError("Size is greater than the size of the buffer")
        self._kvikio.reads.append((file_offset, nbytes, task_size))
        return _IOFuture(lambda: self._read(target[:nbytes], file_offset))

    def _read(self, target: memoryview, offset: int) -> int:
        if self._kvikio.fails(offset, len(target)):
            raise RuntimeError("cuFile error at: file_handle.cpp:1: 5027: GPU memory is gone\nmore")

        data = os.pread(self._file.fileno(), len(target), offset)
        target[: len(data)] = data
        if len(data) < len(target):
            raise RuntimeError("POSIX error on pread: EOF")
        return len(data)


class _IOFuture:
    def __init__(self, work: Callable[[], int]) -> None:
        self._work = work

    def get(self) -> int:
        return self._work()

    def done(self) -> bool:
        return True


def _writable(buf: Any) -> memoryview:
    interface = getattr(buf, "__cuda_array_interface__", None)
    if interface is None:
        view = memoryview(buf)
        assert not view.readonly and view.contiguous
        return view.cast("B")
    (nbytes,), (address, readonly) = interface["shape"], interface["data"]
    assert interface["typestr"] == "|u1" and not readonly
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


class FakeDeviceBytes:
    """Memory that says of itself that it is on a GPU."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.zeros(nbytes, np.uint8)

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.array.ctypes.data, False)
        return {"shape": self.array.shape, "typestr": "|u1", "data": data, "version": 3}
