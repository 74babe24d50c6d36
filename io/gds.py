"""Reads through kvikio: cuFile where there is GPUDirect Storage, its own threads where not.

The only module that knows kvikio, which is an extra and imported when it is first needed: it wants
NVIDIA's driver even for reads into host memory. Its settings belong to the process; all of them
that matter here are set, none is left to a default or to the environment.

Each read is one task of kvikio's: of a read in several tasks, the first to fail ends it while the
others go on writing into its buffer. Where cuFile is not used, kvikio reads into pinned buffers,
one per thread, and copies; they are as large as the parts that the engine asks for.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tierrun.io.errors import UsageError
from tierrun.io.extent import PAGE
from tierrun.io.reader import num_threads
from tierrun.io.reads import PART_BYTES

INSTALL = "pip install 'tierrun[gds]'"

_GDS_THRESHOLD = 16 << 10
"""Device reads below it are not worth a trip through cuFile."""

_KVIKIO_ERRORS = (RuntimeError, ValueError, MemoryError, OSError)
"""What its C++ exceptions become."""

_LOADING_ERRORS = (ImportError, OSError, RuntimeError)

_NVIDIA_FS = Path("/proc/driver/nvidia-fs")


class OnDevice(Protocol):
    """Contiguous bytes in a GPU's memory; a uint8 tensor of torch's is some."""

    @property
    def nbytes(self) -> int: ...

    @property
    def __cuda_array_interface__(self) -> Any: ...


class GdsMode(NamedTuple):
    """Whether reads go from the drive into the GPU without a stop in memory, and why (not)."""

    native: bool
    reason: str


class GdsReader:
    """Reads with kvikio, into host memory (see `Reader`) and into a GPU's.

    Raises:
        UsageError: kvikio is not there, or cannot be loaded.
    """

    name = "gds"

    def __init__(self, paths: Sequence[Path], depth: int, *, compat: bool = False) -> None:
        """`compat`: without cuFile, whether or not there is GPUDirect Storage (to compare)."""
        kvikio = _kvikio()
        if compat:  # a file keeps the mode that it was opened in
            kvikio.defaults.set({"compat_mode": kvikio.CompatMode.ON})
        kvikio.defaults.set(
            {
                "num_threads": num_threads(paths, depth),
                "task_size": PART_BYTES,
                "bounce_buffer_size": PART_BYTES,
                "gds_threshold": _GDS_THRESHOLD,
                "auto_direct_io_read": True,
            }
        )
        for path in paths:
            os.stat(path)  # kvikio's own error about a missing file has no errno
        self._files = [_call(kvikio.CuFile, path) for path in paths]

    def read(self, shard: int, offset: int, into: memoryview) -> None:
        """See `Reader`."""
        self._fill(shard, offset, into)

    def read_device(self, shard: int, offset: int, into: OnDevice) -> None:
        """Fill `into` from `offset` of shard number `shard`; blocks, calls may overlap.

        Guarantees: once it has returned, whatever is launched next on any stream sees the bytes;
        once it has returned or raised, nothing writes to `into` any more.
        Assumes: until then nothing on the GPU uses `into`. Native reads wait for the legacy default
        stream first, so that must not be recording a graph.

        Raises:
            OSError: kvikio's error, or EIO where the file ends early.
        """
        self._fill(shard, offset, into)

    def _fill(self, shard: int, offset: int, into: memoryview | OnDevice) -> None:
        nbytes = into.nbytes
        count = _call(lambda: self._files[shard].pread(into, nbytes, offset, nbytes).get())
        if count != nbytes:
            raise OSError(errno.EIO, f"the file ends at byte {offset + count}")

    def close(self) -> None:
        """See `Reader`."""
        for file in self._files:
            file.close()


def obstacle_to_gds(path: Path) -> str | None:
    """Why kvikio cannot read `path`, in a clause with the remedy; None if it can."""
    try:
        kvikio = _kvikio()
        page = memoryview(mmap.mmap(-1, PAGE))
        with _call(kvikio.CuFile, path) as file:
            _call(lambda: file.pread(page, PAGE, 0, PAGE).get())
    except UsageError as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror or error}; it wants an NVIDIA GPU and its driver"
    return None


def mode() -> GdsMode:
    """How kvikio reads into the GPU's memory here; only where it can read at all."""
    kvikio = _kvikio()
    if kvikio.defaults.is_compat_mode_preferred():
        return GdsMode(False, f"kvikio is in its compatibility mode ({_compat_reason()})")
    if not _has_driver():
        reason = "nvidia-fs is not loaded" if not _NVIDIA_FS.exists() else "nvidia-fs is refused"
        return GdsMode(False, f"cuFile is in its compatibility mode ({reason})")
    return GdsMode(True, "cuFile with nvidia-fs")


def version() -> str:
    """kvikio's."""
    return str(_kvikio().__version__)


def _compat_reason() -> str:
    if not os.access("/run/udev", os.R_OK):
        return "/run/udev cannot be read, as in most containers"
    return "libcufile cannot be used"


def _has_driver() -> bool:
    import kvikio.cufile_driver

    try:
        return bool(kvikio.cufile_driver.get("is_gds_available"))
    except _KVIKIO_ERRORS:
        return False


def _kvikio() -> Any:
    """The module, in its mode by what it finds and not by the environment.

    Raises:
        UsageError: not installed, or a library of its own is missing.
    """
    try:
        import kvikio
        import kvikio.defaults
    except ModuleNotFoundError as error:
        if error.name == "kvikio":
            raise UsageError(f"kvikio is not installed; {INSTALL}") from None
        raise UsageError(f"kvikio cannot be loaded: {error}; {INSTALL}") from None
    except _LOADING_ERRORS as error:
        raise UsageError(f"kvikio cannot be loaded: {_first_line(error)}") from None
    kvikio.defaults.set({"compat_mode": kvikio.CompatMode.AUTO})
    return kvikio


def _call(function: Any, *arguments: Any) -> Any:
    """What `function` of kvikio's returns; its errors as OSError."""
    try:
        return function(*arguments)
    except _KVIKIO_ERRORS as error:
        raise OSError(errno.EIO, f"kvikio: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
