"""Run Mixture-of-Experts models larger than VRAM, larger than RAM, larger than both.

    import tierrun

    tierrun.convert("path/to/checkpoint", "/nvme/model")
    with tierrun.load("/nvme/model", ram="8GiB") as engine:
        for token in engine.generate("def main():", max_new_tokens=64):
            print(token.text, end="")

Importing this module imports no torch; `convert`, `load` and `Engine` bring it in when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierrun.engine.engine import Engine, load
    from tierrun.tools.convert import convert

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "convert", "load"]

_HOMES = {
    "Engine": "tierrun.engine.engine",
    "load": "tierrun.engine.engine",
    "convert": "tierrun.tools.convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tierrun' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
