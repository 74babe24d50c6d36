"""The change that would help most for its price."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tierrun.io.extent import format_bytes
from tierrun.tools.plan.scene import Scene

LEAST_GAIN = 1.05
_ALIKE = 0.9
"""Of the best gain: a cheaper change that reaches so much of it is the better buy."""


class Change(NamedTuple):
    """What to change, decode's speed then, the factor to now, and its price's order (0: none)."""

    change: str
    speed: float
    factor: float
    cost: int


def advise(scene: Scene, recoded: Mapping[str, Scene]) -> list[Change]:
    """Changes that gain at least a twentieth, the best buy first: of those that gain about as much
    as the best does, the cheapest. `recoded` are scenes with other codecs, by name."""
    changes = [c for c in _changes(scene, recoded) if c.factor >= LEAST_GAIN]
    if not changes:
        return []
    enough = 1 + _ALIKE * (max(change.factor for change in changes) - 1)
    good = sorted((c for c in changes if c.factor >= enough), key=lambda c: (c.cost, -c.factor))
    return [*good, *sorted((c for c in changes if c.factor < enough), key=lambda c: -c.factor)]


def _changes(scene: Scene, recoded: Mapping[str, Scene]) -> Iterator[Change]:
    for name, other in recoded.items():
        yield _change(f"experts in {name}", scene, other, 0)
    missing = scene.shape.expert_bytes - scene.tiers.hot - scene.tiers.warm
    if missing > 0:
        more = min(missing, max(scene.tiers.warm, 1 << 30))
        yield _change(f"{format_bytes(more)} more RAM", scene, scene.with_more(warm=more), 1)
    yield _change("a drive twice as fast", scene, scene.with_more(drive=2.0), 2)
    lacking = scene.shape.expert_bytes - scene.tiers.hot
    if scene.rates.has_gpu and lacking > 0:
        more = min(lacking, max(scene.tiers.hot, 4 << 30))
        yield _change(f"{format_bytes(more)} more VRAM", scene, scene.with_more(hot=more), 3)


def _change(what: str, before: Scene, after: Scene, cost: int) -> Change:
    return Change(what, after.speed, after.speed / before.speed, cost)
