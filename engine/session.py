"""A session: one context, its key-value cache, and the steps that extend it.

`step` is the whole of a token: look up, fetch and compute (in the model's forward, through the
experts hook), choose, account.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from tierrun.engine.architecture import continues
from tierrun.engine.context import Context
from tierrun.engine.sampling import Chooser
from tierrun.io.errors import ModelError, UsageError
from tierrun.tiers.ledger import Counters, Ledger

_LOGITS, _FEW = 1 << 27, 512
"""Where all logits are wanted, the most numbers at once (512 MiB), for so many tokens at least."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What one token cost: seconds, and the ledger's counts for it alone.

    The first token after a prompt carries the cost of the whole prefill.
    """

    seconds: float
    counters: Counters


class ForwardHook(Protocol):
    """Told when a forward pass begins and that it is over."""

    def start_forward(self) -> None: ...

    def end_forward(self, tokens: int) -> None: ...


class Session:
    """One sequence of tokens in one model's context of `capacity` tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        context: Context,
        hook: ForwardHook,
        ledger: Ledger,
        capacity: int,
        chunk: int,
    ) -> None:
        self._model, self._context, self._hook, self._ledger = model, context, hook, ledger
        self._capacity, self._chunk = capacity, chunk
        self._continues = continues(model)
        self._vocabulary: int = model.config.get_text_config().vocab_size
        self.tokens: list[int] = []

    def reset(self) -> None:
        """Forget the context."""
        self._context.reset()
        self.tokens = []

    def shared(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are in the context already, if they continue it; else 0."""
        known = len(self.tokens)
        return known if known < len(tokens) and list(tokens[:known]) == self.tokens else 0

    def extend_to(self, tokens: Sequence[int]) -> torch.Tensor:
        """Make `tokens` the context, reusing what is there.

        Returns the logits after the last one, fp32 [vocab].

        Raises:
            UsageError: as `prefill`; the context stays as it was.
        """
        known = self.shared(tokens)
        self._prepare(tokens[known:], known)
        if known == 0:
            self.reset()
        return self.prefill(tokens[known:])

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append `tokens`, a chunk at a time; the logits after the last one, fp32 [vocab].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the context holds;
                BudgetError among them: more than there is memory for. The context stays as it was.
        """
        self._prepare(tokens, len(self.tokens))
        for chunk in self._chunks(tokens, self._chunk):
            logits = self._forward(chunk, last_only=True)
        return logits[-1]

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append `tokens`; the logits after each of them, fp32 [tokens, vocab].

        Raises:
            UsageError: as `prefill`.
        """
        self._prepare(tokens, len(self.tokens))
        chunks = self._chunks(tokens, min(self._chunk, max(_FEW, _LOGITS // self._vocabulary)))
        return torch.cat([self._forward(chunk, last_only=False) for chunk in chunks])

    def _chunks(self, tokens: Sequence[int], size: int) -> list[list[int]]:
        """What goes through the model at once: `size` tokens, where it can continue."""
        if not self._continues:
            size = 1 if self.tokens else len(tokens)
        return [list(tokens[i : i + size]) for i in range(0, len(tokens), size)]

    def _prepare(self, tokens: Sequence[int], known: int) -> None:
        """See that `tokens` can follow the first `known` of the context, and that there is room."""
        self._check(tokens, known)
        self._context.reserve(known + len(tokens), kept=known)

    def _check(self, tokens: Sequence[int], known: int) -> None:
        if not tokens:
            raise UsageError("an empty prompt; give it at least one token")
        if not (0 <= min(tokens) and max(tokens) < self._vocabulary):
            raise UsageError(
                f"token ids must lie in 0 … {self._vocabulary - 1}, the model's vocabulary"
            )
        if known + len(tokens) > self._capacity:
            raise UsageError(
                f"{known + len(tokens)} tokens do not fit a context of {self._capacity}; raise "
                "-c/--ctx-size, or shorten the prompt"
            )

    def generate(
        self, prompt: Sequence[int], chooser: Chooser, count: int
    ) -> Iterator[tuple[int, StepFigures, bool]]:
        """Up to `count` tokens after `prompt`; stops at a full context.

        Yields each token, what it cost, and whether it is the last.
        """
        token, figures = self._measured(lambda: self._choose(self.extend_to(prompt), chooser))
        for i in range(count):
            last = i + 1 == count or len(self.tokens) == self._capacity
            yield token, figures, last
            if last:
                return
            token, figures = self.step(token, chooser)

    def step(self, token: int, chooser: Chooser) -> tuple[int, StepFigures]:
        """Append `token` and choose the one after it; that one, and what it cost."""
        self._prepare([token], len(self.tokens))
        return self._measured(
            lambda: self._choose(self._forward([token], last_only=True)[-1], chooser)
        )

    def _choose(self, logits: torch.Tensor, chooser: Chooser) -> int:
        return chooser.choose(logits, self.tokens)

    def _measured(self, step: Callable[[], int]) -> tuple[int, StepFigures]:
        started, before = time.perf_counter(), self._ledger.snapshot()
        token = step()
        seconds = time.perf_counter() - started
        return token, StepFigures(seconds, self._ledger.snapshot() - before)

    def _forward(self, tokens: Sequence[int], *, last_only: bool) -> torch.Tensor:
        self._hook.start_forward()
        try:
            logits = self._context.forward(tokens, last_only=last_only)
        except BaseException:
            self.reset()
            raise
        self._hook.end_forward(len(tokens))
        self.tokens += tokens
        _check_finite(logits, self._model)
        return logits


def _check_finite(logits: torch.Tensor, model: PreTrainedModel) -> None:
    """NaN is never an answer."""
    if logits[-1].isnan().any():
        raise ModelError(
            f"{model.config.model_type} gave NaN: the checkpoint holds NaNs or overflows; if it "
            "runs in transformers, please report it"
        )
