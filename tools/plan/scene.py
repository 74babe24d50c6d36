"""Everything that a prediction is made from, so that a change of one thing can be tried out."""

from dataclasses import dataclass, replace

from tierrun.tools.plan.decode import decode_times
from tierrun.tools.plan.hits import Hits, Tiers, hits
from tierrun.tools.plan.prefill import CPU_CHUNK, GPU_CHUNK, prefill_times
from tierrun.tools.plan.rates import Rates
from tierrun.tools.plan.routing import Routing
from tierrun.tools.plan.shape import Shape
from tierrun.tools.plan.times import Times


@dataclass(frozen=True, slots=True)
class Scene:
    """A model on a machine with budgets, routed in some way."""

    shape: Shape
    tiers: Tiers
    routing: Routing
    rates: Rates
    context: int

    @property
    def hits(self) -> Hits:
        layer_bytes = self.shape.token_bytes / len(self.shape.layers)
        return hits(self.tiers, self.shape.expert_bytes, self.routing, layer_bytes)

    @property
    def decode(self) -> Times:
        """One token at the end of the context."""
        return decode_times(self.shape, self.hits, self.rates, self.context)

    @property
    def speed(self) -> float:
        """Tokens per second of decode."""
        return 1 / self.decode.total

    @property
    def chunk(self) -> int:
        """Tokens of a prompt computed at once."""
        return min(self.context, GPU_CHUNK if self.rates.has_gpu else CPU_CHUNK)

    @property
    def prefill(self) -> Times:
        """One chunk of a prompt."""
        return prefill_times(self.shape, self.tiers, self.routing, self.rates, self.chunk)

    def with_more(self, *, hot: int = 0, warm: int = 0, drive: float = 1.0) -> "Scene":
        """The same with `hot` and `warm` bytes more, and a drive so many times as fast."""
        tiers = Tiers(self.tiers.hot + hot, self.tiers.warm + warm)
        return replace(self, tiers=tiers, rates=replace(self.rates, drive=self.rates.drive * drive))
