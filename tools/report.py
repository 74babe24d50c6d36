"""What a generation cost, as one line for people and as a record for programs."""

from dataclasses import asdict, dataclass, field
from typing import Any

from tierrun.engine.tokens import TokenRecord
from tierrun.tiers.ledger import Counters


@dataclass(slots=True)
class Answer:
    """One answer: its tokens, and what it cost as a whole, prompt and unfinished steps included.

    `prompt_tokens` were read before the first token; the first record carries their cost.
    `read_seconds` is the time in which any read was under way.
    """

    prompt_tokens: int
    tokens: list[TokenRecord] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    seconds: float = 0.0
    read_seconds: float = 0.0
    interrupted: bool = False

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: all tokens but the first, which came out of the prompt's prefill."""
        steps = self.tokens[1:]
        seconds = sum(token.figures.seconds for token in steps)
        return len(steps) / seconds if seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        seconds = self.tokens[0].figures.seconds if self.tokens else 0.0
        return self.prompt_tokens / seconds if seconds else 0.0

    def line(self) -> str:
        """Speed, share of lookups by tier, bytes read and their speed, share of time waited.

        Shares, bytes and waiting are of the whole answer, prompt included; tok/s of decode alone.
        """
        c = self.counters
        lookups = max(1, c.lookups)
        speed = c.read_bytes / self.read_seconds if self.read_seconds else 0.0
        waited = c.wait_seconds / self.seconds if self.seconds else 0.0
        return (
            f"{len(self.tokens)} tok {self.tokens_per_second:.1f} tok/s · "
            f"hot {c.hot / lookups:.0%} warm {c.warm / lookups:.0%} nvme {c.cold / lookups:.0%} · "
            f"{_amount(c.read_bytes)} read at {_amount(speed)}/s · waited {waited:.0%}"
        ).replace("%", " %")

    def details(self) -> str:
        """What the line leaves out: the prompt's speed, look-ahead, and moves between tiers."""
        c = self.counters
        return (
            f"prompt {self.prompt_tokens} tok {self.prompt_tokens_per_second:.1f} tok/s · "
            f"look-ahead {c.ahead_issued} issued, {c.ahead_useful} useful, {c.ahead_late} late, "
            f"{c.ahead_wasted} wasted, {c.ahead_dropped} dropped · promoted "
            f"{_amount(c.promoted_bytes)}, demoted {_amount(c.demoted_bytes)}"
        )

    def record(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        finish = (
            "interrupted" if self.interrupted else self.tokens[-1].finish if self.tokens else ""
        )
        return {
            "text": self.text,
            "finish": finish,
            "prompt_tokens": self.prompt_tokens,
            "tokens_per_second": self.tokens_per_second,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "seconds": self.seconds,
            "read_seconds": self.read_seconds,
            "counters": asdict(self.counters),
            "tokens": [
                {
                    "id": token.id,
                    "text": token.text,
                    "seconds": token.figures.seconds,
                    "counters": asdict(token.figures.counters),
                }
                for token in self.tokens
            ],
        }


def _amount(nbytes: float) -> str:
    """Decimal units, as drives are sold: `1.40 GB`, below a tenth of that `35 MB`."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
