"""A child of the doctor: whether packages that compile can be loaded."""

import importlib
import signal

from tierrun.tools.doctor.facts import LIFETIME, Imports


def import_error(name: str) -> str | None:
    """Why the package `name` cannot be loaded, in a line; None if it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a package that is half installed raises anything
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


def main() -> None:
    """Print the facts."""
    print(Imports(numba=import_error("numba"), triton=import_error("triton")).model_dump_json())


if __name__ == "__main__":
    signal.alarm(LIFETIME)
    main()
