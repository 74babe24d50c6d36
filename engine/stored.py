"""Linear and embedding modules whose weights stay as stored, mapped from the store's files.

The module keeps its class's behaviour (an embedding that scales its rows goes on scaling them): a
class between the module's own and torch's answers the inner `forward`. The `weight` attribute is a
placeholder without memory (`tierrun.engine.placeholder`).
"""

from typing import Any, Protocol

import torch
from torch import nn

from tierrun.engine.codecs.weight import Weight
from tierrun.engine.placeholder import Placeholder


class Kernels(Protocol):
    """Products with weights as they are stored, on one device; in and out are fp32.

    `weight` is what the device's kernels take: a `Weight` on the CPU.
    """

    def linear(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x` [n, in] times `weight` [out, in], transposed: [n, out]."""

    def embedding(self, ids: torch.Tensor, weight: Any) -> torch.Tensor:
        """The rows `ids` [n] of `weight` [rows, dim]: [n, dim]."""


class StoredLinear(nn.Linear):
    """`nn.Linear` over `stored` [out, in] in any dtype or codec; input and output fp32."""

    stored: Any
    kernels: Kernels

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        rows = input.reshape(-1, input.shape[-1])
        y = self.kernels.linear(rows, self.stored, self.bias)
        return y.view(*input.shape[:-1], y.shape[-1])


class StoredEmbedding(nn.Embedding):
    """`nn.Embedding` over `stored` [rows, dim] in any dtype or codec; output fp32."""

    stored: Any
    kernels: Kernels

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        return self.kernels.embedding(input.flatten(), self.stored).view(*input.shape, -1)


def can_store(module: nn.Module) -> bool:
    """Whether `module` reads its weight through torch's own linear or embedding forward only."""
    kind = type(module)
    if not isinstance(module, nn.Linear | nn.Embedding):
        return False
    if kind in (nn.Linear, nn.Embedding):
        return True
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    between = [vars(cls) for cls in kind.__mro__[: kind.__mro__.index(base)]]
    own = [members["forward"] for members in between if "forward" in members]
    return all("__class__" in forward.__code__.co_freevars for forward in own)


def store_back(module: nn.Module, stored: Weight, kernels: Kernels) -> nn.Parameter:
    """Make `module` (for which `can_store`) compute with `stored`; returns its placeholder."""
    # The class is changed in place, as quantisation libraries do, because parents hold references.
    module.__class__ = _stored_class(type(module))
    assert isinstance(module, StoredLinear | StoredEmbedding)
    module.weight = Placeholder.of(stored)
    module.stored, module.kernels = stored, kernels
    return module.weight


def _stored_class(kind: type[nn.Module]) -> type[nn.Module]:
    base = StoredLinear if issubclass(kind, nn.Linear) else StoredEmbedding
    if kind in (nn.Linear, nn.Embedding):
        return base
    return type(f"Stored{kind.__name__}", (kind, base), {})
