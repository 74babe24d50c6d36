"""A session: one context, its key-value cache, and the steps that extend it.

`step` is the whole of a token: look up, fetch, compute (in the model's forward, through the
experts hook), choose, account.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from tierrun.engine.experts import ExpertsHook
from tierrun.engine.sampling import Sampler
from tierrun.io.errors import ModelError, UsageError
from tierrun.tiers.ledger import Counters, Ledger


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What one token cost: seconds, and the ledger's counts for it alone.

    The first token after a prompt carries the cost of the whole prefill.
    """

    seconds: float
    counters: Counters


class Session:
    """One sequence of tokens in one model's context of `context` tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        hook: ExpertsHook,
        ledger: Ledger,
        context: int,
        ubatch: int,
    ) -> None:
        self._model, self._hook, self._ledger = model, hook, ledger
        self._context, self._ubatch = context, ubatch
        self._few_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache: Cache | None = None
        self.tokens: list[int] = []

    def reset(self) -> None:
        """Forget the context."""
        self._cache = None
        self.tokens = []

    def extend_to(self, tokens: Sequence[int]) -> tuple[torch.Tensor, StepFigures]:
        """Make `tokens` the context, reusing what is there already if they continue it.

        Returns the logits after the last token, fp32 [vocab], and what that cost.
        """
        known = len(self.tokens)
        if list(tokens[:known]) != self.tokens or known == len(tokens):
            self.reset()
        return self._measured(lambda: self.prefill(tokens[len(self.tokens) :]))

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append `tokens`, `ubatch` at a time; the logits after the last one, fp32 [vocab].

        Raises:
            UsageError: no token, or more than the context holds.
        """
        if not tokens:
            raise UsageError("an empty prompt; give it at least one token")
        for chunk in _chunks(tokens, self._ubatch):
            logits = self._forward(chunk, last_only=True)
        return logits[-1]

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append `tokens`; the logits after each of them, fp32 [tokens, vocab]."""
        chunks = _chunks(tokens, self._ubatch)
        return torch.cat([self._forward(chunk, last_only=False) for chunk in chunks])

    def generate(
        self,
        prefilled: tuple[torch.Tensor, StepFigures],
        sampler: Sampler,
        count: int,
        fixed: Sequence[int] = (),
    ) -> Iterator[tuple[int, StepFigures, bool]]:
        """Up to `count` tokens after the logits of `prefilled`; stops at a full context.

        Yields each token, what the forward pass that led to it cost, and whether it is the last.
        With `fixed`, those tokens are taken instead of sampled ones: the same stream for every
        arm of a comparison.
        """
        logits, figures = prefilled
        for i in range(count):
            token = fixed[i] if fixed else sampler.choose(logits, torch.tensor(self.tokens))
            last = i + 1 == count or len(self.tokens) == self._context
            yield token, figures, last
            if last:
                return
            logits, figures = self.step(token)

    def step(self, token: int) -> tuple[torch.Tensor, StepFigures]:
        """Append one token: the logits after it, fp32 [vocab], and what that cost."""
        return self._measured(lambda: self._forward([token], last_only=True)[-1])

    def _measured(self, forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, StepFigures]:
        started, before = time.perf_counter(), self._ledger.snapshot()
        logits = forward()
        seconds = time.perf_counter() - started
        return logits, StepFigures(seconds, self._ledger.snapshot() - before)

    def _forward(self, tokens: Sequence[int], *, last_only: bool) -> torch.Tensor:
        if len(self.tokens) + len(tokens) > self._context:
            raise UsageError(
                f"{len(self.tokens) + len(tokens)} tokens do not fit a context of {self._context}; "
                "raise -c/--ctx-size, or shorten the prompt"
            )
        keep = {"logits_to_keep": 1} if last_only and self._few_logits else {}
        forward: Callable[..., Any] = self._model
        self._hook.start_forward()
        try:
            with torch.inference_mode():
                output = forward(
                    input_ids=torch.tensor([list(tokens)]),
                    past_key_values=self._cache,
                    use_cache=True,
                    **keep,
                )
        except BaseException:
            self.reset()  # some layers have the new tokens in their cache, some do not
            raise
        self._hook.end_forward(len(tokens))
        self._cache = output.past_key_values
        self.tokens += tokens
        logits: torch.Tensor = output.logits[0].float()
        _check_finite(logits, self._model)
        return logits


def _check_finite(logits: torch.Tensor, model: PreTrainedModel) -> None:
    """A NaN means that the architecture reads a stored weight past its module (see `stored`)."""
    if logits[-1].isnan().any():
        raise ModelError(
            f"{model.config.model_type} gave NaN: the checkpoint holds NaNs, or this architecture "
            "reads weights in a way that tierrun does not support; please report it"
        )


def _chunks(tokens: Sequence[int], size: int) -> list[list[int]]:
    return [list(tokens[i : i + size]) for i in range(0, len(tokens), size)]
