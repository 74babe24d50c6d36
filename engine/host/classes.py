"""Modules that get another forward, and keep all else that their class does.

A class between, as quantisation libraries make them: parents hold references to the module, and a
function put on it would refer back to it, so that nothing of a closed engine would go at once.
"""

from typing import Any

from torch import nn


def become(module: nn.Module, forward: type[nn.Module], **attributes: Any) -> None:
    """Put `forward` before the class of `module`; `super().forward` there is its own."""
    kind = type(module)
    module.__class__ = type(f"{forward.__name__}{kind.__name__}", (forward, kind), {})
    for name, value in attributes.items():
        object.__setattr__(module, name, value)  # no parameter of it
