"""Triton's interpreter without work that it does again and again."""

import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Patch the language once per launch, not again for every function that a kernel calls.

    The patches of the launch are in place until it is over, and those of a called function are the
    same ones: a third of the time of a kernel of many small functions.
    """
    original: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[str] = set()

    def patch(fn: Any) -> Any:
        found = {
            value.__name__
            for value in fn.__globals__.values()
            if inspect.ismodule(value) and value in (tl, tl.core)
        }
        if found and found <= patched:
            return interpreter._LangPatchScope()
        scope = original(fn)
        restore = scope.restore
        patched.update(found)

        def restore_and_forget() -> None:
            patched.difference_update(found)
            restore()

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch
