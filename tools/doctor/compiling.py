"""What compiles kernels on this machine, and where the compiled ones are kept."""

import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import tierrun
from tierrun.tools.doctor.child import Answer
from tierrun.tools.doctor.facts import Imports
from tierrun.tools.doctor.line import Line
from tierrun.tools.doctor.software import SOFTWARE, installed


def compiling_lines(answer: Answer[Imports], gpu: bool) -> list[Line]:
    """Everything that compiles; `gpu`: whether there is one to compile for."""
    return [
        *import_lines(answer, gpu),
        compiler_line(find_compiler(os.environ), include_directory(), gpu),
        cache_line(cache_places(os.environ, Path(os.path.expanduser("~")))),
    ]


def import_lines(answer: Answer[Imports], gpu: bool) -> list[Line]:
    """Whether numba and Triton can be loaded; Triton is for GPUs."""
    if answer.facts is None:
        return [SOFTWARE.unknown(name, answer.problem) for name in ("numba", "Triton")]
    return [_numba(answer.facts.numba), _triton(answer.facts.triton, gpu)]


def _numba(error: str | None) -> Line:
    if error is None:
        return SOFTWARE.ok("numba", str(installed("numba")))
    advice = "pip install --force-reinstall numba: the CPU's kernels are compiled by it"
    return SOFTWARE.fail("numba", f"cannot be loaded: {error}", advice)


def _triton(error: str | None, gpu: bool) -> Line:
    if error is None:
        return SOFTWARE.ok("Triton", str(installed("triton")))
    if not gpu:
        return SOFTWARE.ok("Triton", "not usable; only a GPU needs it")
    advice = "pip install --force-reinstall triton: the GPU's kernels are written in it"
    return SOFTWARE.fail("Triton", f"cannot be loaded: {error}", advice)


def compiler_line(compiler: str | None, include: Path, gpu: bool) -> Line:
    """The C compiler that Triton and torch.compile call, and Python's headers in `include`."""
    headers = (include / "Python.h").is_file()
    value = (compiler or "none") + ("" if headers else f"; no Python.h in {include}")
    if compiler and headers:
        return SOFTWARE.ok("C compiler", value)
    if not gpu:
        return SOFTWARE.ok("C compiler", f"{value}; only a GPU's kernels need one, with Python.h")
    return SOFTWARE.fail(
        "C compiler",
        value,
        "install gcc and Python's headers (apt install gcc python3-dev): Triton compiles what "
        "launches its kernels",
    )


def find_compiler(environment: Mapping[str, str]) -> str | None:
    """The one that Triton would take: $CC, else gcc, else clang."""
    names = (environment["CC"],) if environment.get("CC") else ("gcc", "clang")
    search = environment.get("PATH")
    return next((path for name in names if (path := shutil.which(name, path=search))), None)


def include_directory() -> Path:
    """Where Python's headers should be, as Triton looks for them."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_paths(scheme)["include"])


def cache_places(environment: Mapping[str, str], home: Path) -> dict[str, list[Path]]:
    """Where compiled code and measurements are kept: in the first place that can be written."""
    user = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    triton = Path(environment.get("TRITON_HOME") or home) / ".triton" / "cache"
    beside = Path(tierrun.__file__).parent / "engine" / "kernels" / "__pycache__"
    numba = environment.get("NUMBA_CACHE_DIR")
    return {
        "tierrun": [user / "tierrun"],
        "Triton": [Path(environment.get("TRITON_CACHE_DIR") or triton)],
        "numba": [Path(numba)] if numba else [beside, user / "numba"],
    }


def cache_line(places: Mapping[str, Sequence[Path]]) -> Line:
    """Whether each of `cache_places` can be written."""
    chosen = {name: next(filter(_is_writable, paths), None) for name, paths in places.items()}
    lost = {name: paths[0] for name, paths in places.items() if chosen[name] is None}
    kept = ", ".join(f"{name} {path}" for name, path in chosen.items() if path is not None)
    if not lost:
        return SOFTWARE.ok("caches", kept)
    refused = ", ".join(f"{name} {path}" for name, path in lost.items())
    return SOFTWARE.warn(
        "caches",
        f"not writable: {refused}" + (f"; writable: {kept}" if kept else ""),
        "give this user the directory, or name another with XDG_CACHE_HOME, TRITON_CACHE_DIR or "
        "NUMBA_CACHE_DIR: until then every run compiles and measures anew",
    )


def _is_writable(path: Path) -> bool:
    """Whether files can be made in `path`, which need not be there yet."""
    there = next((place for place in (path, *path.parents) if place.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
