"""Who has the memory of a device: the key-value cache of the context, or the experts.

Both are worth something in milliseconds per MiB and 1000 tokens. To the experts, memory saves the
copies of what would not be there. To a context that needs it, it is worth everything: without it
there is no next token. To one that does not, it saves taking it again: what growing has cost so
far, over all tokens. Numbers in, decisions out.
"""

from typing import NamedTuple

from tierrun.tiers.ledger import Counters

_MIB = 1 << 20
_TOKENS = 1000

_GUESSED_COPY = 1 / 20e9
"""Seconds per byte of a copy to the device before any has been measured: PCIe 4."""
_LEAST_COPIED = 64 << 20

_UNIT = "ms per MiB and 1000 tokens"


class Verdict(NamedTuple):
    """Whether the experts get memory that the context does not need now, and why."""

    to_experts: bool
    reason: str


class Arbiter:
    """Remembers what it cost the context to grow; knows what copies cost from the ledger."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._seconds = 0.0

    def grown(self, seconds: float) -> None:
        """The context has grown, which took so long."""
        self._seconds += seconds

    def worth_to_experts(self, nbytes: int, traffic: float) -> float:
        """Of `nbytes` that save copies of `traffic` bytes per token."""
        return _per_mib(traffic * self._copy_seconds(), nbytes)

    def worth_to_context(self, nbytes: int, tokens: int) -> float:
        """Of `nbytes` that it does not need now, after `tokens` in all."""
        return _per_mib(self._seconds / max(_TOKENS, tokens), nbytes)

    def judge(self, nbytes: int, traffic: float, tokens: int) -> Verdict:
        """Who gets `nbytes` that the present context does not need; see the worths above."""
        experts = self.worth_to_experts(nbytes, traffic)
        context = self.worth_to_context(nbytes, tokens)
        reason = f"worth {experts:.3g} {_UNIT} to them, {context:.3g} to the next context"
        return Verdict(experts > context, reason)

    def price(self, nbytes: int, traffic: float) -> str:
        """What the experts lose with `nbytes`, in words."""
        return f"worth {self.worth_to_experts(nbytes, traffic):.3g} {_UNIT} to them"

    def _copy_seconds(self) -> float:
        """Per byte."""
        copied = self._counters.promoted_bytes + self._counters.demoted_bytes
        if copied < _LEAST_COPIED or not self._counters.copy_seconds:
            return _GUESSED_COPY
        return self._counters.copy_seconds / copied


def _per_mib(seconds_per_token: float, nbytes: int) -> float:
    """Milliseconds per MiB and 1000 tokens."""
    return seconds_per_token * 1000 * _TOKENS * _MIB / nbytes if nbytes else 0.0
