"""What was found out and predicted, as a document."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import tierrun
from tierrun.io.store import Manifest
from tierrun.tiers.budget import smallest_budget
from tierrun.tools.plan import document, routing
from tierrun.tools.plan.advice import advise
from tierrun.tools.plan.kv import Cache
from tierrun.tools.plan.rates import Rates
from tierrun.tools.plan.recode import CODEC_NAMES, codecs_of
from tierrun.tools.plan.scene import Scene
from tierrun.tools.plan.subject import Subject
from tierrun.tools.plan.times import LABELS, Times

_SOME = 1e-4
"""Share of the lookups from which on the drive is spoken of."""

_ALIKE = 1.01


@dataclass(frozen=True, slots=True)
class Found:
    """What a plan is about: `manifest` is the store's, in the codec asked for; `sources` says
    whence each rate is known, `reasons` why the tiers have what they have; `is_told`: the routing
    was asked for or recorded."""

    subject: Subject
    manifest: Manifest
    scene: Scene
    cache: Cache
    sources: Mapping[str, str]
    reasons: tuple[str, str]
    is_told: bool


def describe(found: Found, recoded: Mapping[str, Scene]) -> document.Plan:
    """The plan of what was `found`; `recoded` are its scene with other codecs, by name."""
    subject, manifest, scene = found.subject, found.manifest, found.scene
    shape, codec = scene.shape, codecs_of(manifest)
    first = shape.layers[0]
    is_plain = codecs_of(subject.manifest) in CODEC_NAMES.values()
    others = {  # what is quantised cannot be had finer
        name: other
        for name, other in recoded.items()
        if name != codec and (is_plain or other.shape.expert_bytes < shape.expert_bytes)
    }
    among = _range(found)
    return document.Plan(
        tierrun=tierrun.__version__,
        model=document.Model(
            name=subject.name,
            kind=subject.kind,
            architecture=manifest.architecture,
            layers=len(shape.layers),
            experts=first.count,
            top_k=first.top_k,
            codec=codec,
            expert_bytes=shape.expert_bytes,
            resident_bytes=shape.resident_bytes,
            token_bytes=shape.token_bytes,
            smallest_budget=smallest_budget(manifest),
            kv_bytes_per_1k=shape.kv_bytes(1024),
            kv_source=found.cache.reason,
        ),
        device="gpu" if scene.rates.has_gpu else "cpu",
        context=scene.context,
        codecs=tuple(_codec(name, other) for name, other in recoded.items()),
        tiers=_tiers(scene, found.reasons),
        routing=scene.routing.name,
        routing_source=scene.routing.source,
        rates=_rates(scene.rates, found.sources),
        decode=_speed(scene.decode, 1, among),
        prefill=_speed(scene.prefill, scene.chunk),
        notes=tuple(_notes(scene, among)),
        advice=tuple(
            document.Advice(
                change=change.change,
                tokens_per_second=change.speed,
                factor=change.factor,
                cost=change.cost,
            )
            for change in advise(scene, others)
        ),
    )


def _codec(name: str, scene: Scene) -> document.Codec:
    size = scene.shape.expert_bytes
    return document.Codec(
        codec=name,
        expert_bytes=size,
        store_bytes=size + scene.shape.resident_bytes,
        tokens_per_second=scene.speed,
    )


def _tiers(scene: Scene, reasons: tuple[str, str]) -> tuple[document.Tier, ...]:
    whole, found = scene.shape.expert_bytes, scene.hits
    hot = min(scene.tiers.hot, whole)
    warm = min(scene.tiers.warm, whole)
    return (
        _tier("hot", hot, whole, found.hot, reasons[0]),
        _tier("warm", warm, whole, found.warm, reasons[1]),
        _tier("drive", whole, whole, found.cold, "all of them"),
    )


def _tier(
    name: Literal["hot", "warm", "drive"], nbytes: int, whole: int, rate: float, reason: str
) -> document.Tier:
    rate = min(1.0, max(0.0, rate))
    return document.Tier(
        name=name, nbytes=nbytes, share_of_experts=nbytes / whole, hit_rate=rate, reason=reason
    )


def _rates(rates: Rates, sources: Mapping[str, str]) -> tuple[document.Rate, ...]:
    """Those that count: of a GPU only where there is one."""
    return tuple(
        document.Rate(name=field.name, value=getattr(rates, field.name), source=source)
        for field in fields(Rates)
        if (source := sources.get(field.name)) is not None
    )


def _range(found: Found) -> document.Range | None:
    """The speeds of all default curves, where how the model routes is not known, and matters."""
    if found.is_told:
        return None
    scene, first = found.scene, found.scene.shape.layers[0]
    others = {
        name: replace(scene, routing=routing.choose(name, None, first.count, first.top_k)).speed
        for name in routing.DEFAULTS
    }
    least, most = (pick(others, key=lambda name: others[name]) for pick in (min, max))
    if others[most] < _ALIKE * others[least]:
        return None  # what is chosen makes no difference: it is all in memory, or none of it
    return document.Range(
        least=others[least],
        most=others[most],
        reason=f"how it routes is not known ({least} to {most})",
    )


def _notes(scene: Scene, among: document.Range | None) -> Iterator[str]:
    if among is not None:
        yield (
            f"decode: {among.least:.1f} to {among.most:.1f} tok/s, since {among.reason}; running "
            "the store records it, --routing asks for one"
        )
    if scene.rates.has_gpu and scene.hits.cold > _SOME:
        yield (
            "decode reads from the drive: what the host does for such a miss is not counted on a "
            "GPU, so this is the best case (measured: 0.6 of it; docs/plan.md)"
        )


def _speed(times: Times, tokens: int, among: document.Range | None = None) -> document.Speed:
    return document.Speed(
        tokens_per_second=tokens / times.total,
        among=among,
        tokens=tokens,
        limit=LABELS[times.limit],
        seconds={name: value for name, value in times.by_name().items() if value > 0},
    )
