"""The `weight` attribute of a module whose weight stays as stored.

It has the shape and dtype that the module's weight would have in fp32, and no memory of its own.
Code that computes with it directly, past the module (jamba's `self.dt_proj.weight @ …`), gets the
stored values widened for that one operation: slower, never wrong.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_map

from tierrun.engine.codecs.weight import Weight, widened

_METADATA = {
    "__get__", "__set__", "__repr__", "__len__", "__hash__", "detach", "dim", "element_size",
    "is_complex", "is_contiguous", "is_floating_point", "numel", "requires_grad_", "size", "stride",
}  # fmt: skip
"""What may be asked without looking at values."""

_VALUE_PROPERTIES = {"T", "H", "mT", "mH", "data", "real"}
"""Properties whose getters give values all the same."""


class Placeholder(torch.Tensor):
    """Stands for `stored`, widened to fp32; every operation on it works on a widened copy."""

    stored: Weight

    @staticmethod
    def of(stored: Weight, device: torch.device | None = None) -> torch.nn.Parameter:
        """A parameter that stands for `stored`, on `device` (default: the CPU)."""
        shape: torch.Tensor = torch.full((), float("nan"), device=device).expand(stored.shape)
        parameter = torch.nn.Parameter(shape.as_subclass(Placeholder), requires_grad=False)
        parameter.stored = stored  # type: ignore[attr-defined]
        return parameter

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        owner = getattr(func, "__self__", None)
        values = getattr(owner, "__name__", "") in _VALUE_PROPERTIES
        if func.__name__ in _METADATA and not values:
            ask: Any = super().__torch_function__
            answer = ask(func, types, args, kwargs or {})
            if isinstance(answer, Placeholder):
                vars(answer).update(vars(args[0]))  # `detach` gives another stand-in
            return answer
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))


def _widened(value: Any) -> Any:
    if not isinstance(value, Placeholder):
        return value
    return widened(value.stored).to(value.device)
