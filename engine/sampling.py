"""Choosing the next token from logits, by the usual rules in llama.cpp's order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tierrun.io.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; 0 and 1 turn `top_k` and `top_p` off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, good in (
            ("--temp", self.temperature, self.temperature >= 0),
            ("--top-k", self.top_k, self.top_k >= 0),
            ("--top-p", self.top_p, 0 < self.top_p <= 1),
            ("--min-p", self.min_p, 0 <= self.min_p < 1),
            ("--repeat-penalty", self.repetition_penalty, self.repetition_penalty > 0),
            ("--seed", self.seed, self.seed is None or 0 <= self.seed < 1 << 63),
        ):
            if not good:
                raise UsageError(f"{name} {value} is out of range")


def sampling_from(defaults: dict[str, Any], **given: Any) -> Sampling:
    """A model's `generation_config` as defaults, overridden by what was `given` (None: not given).

    A model that says `do_sample: false`, or nothing, decodes greedily.
    """
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    if defaults.get("do_sample"):
        chosen = {n: defaults[n] for n in names if defaults.get(n) is not None}
        chosen.setdefault("temperature", 1.0)
        chosen["top_k"] = max(0, chosen.get("top_k", 0))  # some say -1 for off
    else:
        chosen = {"temperature": 0.0}
        if defaults.get("repetition_penalty") is not None:
            chosen["repetition_penalty"] = defaults["repetition_penalty"]
    return Sampling(**chosen | {name: value for name, value in given.items() if value is not None})


class Chooser(Protocol):
    """Chooses the token after a context."""

    def choose(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """The next token from `logits` fp32 [vocab], given the token ids of `history`."""


class FixedTokens:
    """Takes the tokens of a list, whatever the logits: the same stream for every arm of a
    comparison."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def choose(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        return next(self._tokens)


class Sampler:
    """Draws tokens under one `Sampling`; the same seed draws the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        s = self._sampling
        logits = penalise(logits, history, s.repetition_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        logits = keep_top_k(logits, s.top_k)
        kept = logits.isfinite().nonzero().flatten()  # the rest is sorted and summed for nothing
        logits = keep_min_p(keep_top_p(logits[kept], s.top_p), s.min_p)
        probabilities = (logits / s.temperature).softmax(dim=-1)
        return int(kept[torch.multinomial(probabilities, 1, generator=self._generator)])


def penalise(logits: torch.Tensor, history: Sequence[int], penalty: float) -> torch.Tensor:
    """Divide positive logits of tokens in `history` by `penalty`, multiply negative ones (CTRL)."""
    if penalty == 1.0 or not history:
        return logits
    seen = torch.tensor(sorted(set(history)))
    old = logits[seen]
    return logits.index_put((seen,), torch.where(old > 0, old / penalty, old * penalty))


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """All but the `k` largest become −inf; 0 keeps all."""
    if k == 0 or k >= logits.numel():
        return logits
    least = logits.topk(k).values[-1]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """The fewest tokens whose probabilities reach `p` stay (nucleus sampling)."""
    if p >= 1.0:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return logits.index_fill(0, order[before >= p], float("-inf"))


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Tokens less probable than `p` times the most probable one go."""
    if p == 0.0:
        return logits
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), float("-inf"))
