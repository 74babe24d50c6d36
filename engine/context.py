"""What remembers a sequence: the key-value cache, and the model's forward pass over it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import Cache, PreTrainedModel

from tierrun.engine.architecture import keeps_few_logits
from tierrun.engine.host.cache import let_grow


class Context(Protocol):
    """Runs tokens through the model after those that it has seen.

    A `forward` that raises leaves the context in need of a `reset`: some layers have the new
    tokens in their cache, some do not.
    """

    def reserve(self, length: int, *, kept: int) -> None:
        """Have room for `length` tokens in all, the first `kept` of which are there already.

        With `kept` 0, what is there may be forgotten.

        Raises:
            BudgetError: there is not so much memory; everything is as it was.
        """

    def forward(self, tokens: Sequence[int], *, last_only: bool) -> torch.Tensor:
        """The logits after each of `tokens`, or after the last only: fp32 [n, vocab] on the CPU."""

    def reset(self) -> None:
        """Forget everything."""


class CpuContext:
    """A context in host memory; the model makes its own cache."""

    def __init__(
        self, model: PreTrainedModel, before: Callable[[int], None], *, grows: bool
    ) -> None:
        """`before` is told how many tokens are next. With `grows` the cache grows in place, where
        the model's own would be copied each time."""
        self._model, self._before, self._grows = model, before, grows
        self._few_logits = keeps_few_logits(model)
        self._cache: Cache | None = None

    def reserve(self, length: int, *, kept: int) -> None:
        """See `Context`; host memory is taken as it is needed."""

    def forward(self, tokens: Sequence[int], *, last_only: bool) -> torch.Tensor:
        """See `Context`."""
        self._before(len(tokens))
        keep = {"logits_to_keep": 1} if last_only and self._few_logits else {}
        forward: Callable[..., Any] = self._model
        with torch.inference_mode():
            output = forward(
                input_ids=torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                **keep,
            )
            if self._cache is None and self._grows:
                let_grow(output.past_key_values)
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def reset(self) -> None:
        """See `Context`."""
        self._cache = None
