"""From a request to a plan: find the model, know the machine, predict, advise."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from tierrun.io.errors import UsageError
from tierrun.io.store import Manifest
from tierrun.tiers.budget import (
    Budget,
    DeviceFigures,
    DeviceNeeds,
    plan_tier,
    resolve_device_vram,
    resolve_ram,
    resolve_vram,
)
from tierrun.tools.plan import document, routing
from tierrun.tools.plan.describing import Found, describe
from tierrun.tools.plan.hits import Tiers
from tierrun.tools.plan.knowing import MEASURED, Known, Target, know, target_of, typical
from tierrun.tools.plan.kv import cache_of
from tierrun.tools.plan.machine import Machine
from tierrun.tools.plan.recode import codecs_of, recode
from tierrun.tools.plan.request import Request
from tierrun.tools.plan.scene import Scene
from tierrun.tools.plan.shape import Shape, shape_of
from tierrun.tools.plan.subject import find

CODECS = ("bf16", "q8_0", "q4_0", "mxfp4")
"""Of which the store's size is said: those that conversion quantises to, and plain numbers."""


class Made(NamedTuple):
    """A plan, and the scene that it describes."""

    plan: document.Plan
    scene: Scene


def make_plan(request: Request, *, tiers: Tiers | None = None) -> Made:
    """The plan for `request`; with the bytes of `tiers` instead of its budgets, if given.

    Raises:
        UsageError: an option out of range; BudgetError says the smallest budget that works.
        CheckpointError, ModelError, StoreError: nothing that can be planned for.
    """
    target, machine = target_of(request), Machine(fresh=request.measure)
    subject = find(request.source, request.directories)
    manifest = subject.manifest
    if request.codec is not None and request.codec != codecs_of(manifest):
        manifest = recode(manifest, request.codec)
    cache, looked_up = cache_of(subject.config), subject.looked_up()
    bytes_of_number = 2 if target.is_gpu else 4
    kv = (cache.per_token * bytes_of_number, cache.fixed * bytes_of_number)
    shape = shape_of(manifest, looked_up, *kv)
    first = shape.layers[0]
    route = routing.choose(request.routing, subject.usage, first.count, first.top_k)
    reasons = ("the last run's", "the last run's")
    if tiers is None:
        tiers, reasons = _budgets(request, target, manifest, shape)
    known = know(target, request, subject, manifest, looked_up, machine)
    scene = Scene(shape, tiers, route, known.rates, request.context)
    is_told = request.routing is not None or route.name == "recorded"
    found = Found(subject, manifest, scene, cache, known.sources, reasons, is_told)
    codecs = dict.fromkeys((codecs_of(subject.manifest), codecs_of(manifest), *CODECS))
    recoded = _recoded(codecs, scene, subject.manifest, looked_up, kv, known, machine)
    return Made(describe(found, recoded), scene)


# -- budgets ----------------------------------------------------------------------------------


def _budgets(
    request: Request, target: Target, manifest: Manifest, shape: Shape
) -> tuple[Tiers, tuple[str, str]]:
    """What the tiers keep, cut into slots as the engine cuts them, and why so much."""
    vram = _vram(request, target, shape)
    beside = 0 if target.is_gpu else shape.resident_bytes + vram.nbytes
    ram = resolve_ram(request.ram, beside)
    if target.is_gpu and ram.nbytes == 0:
        raise UsageError(
            "--ram 0: on a GPU reads land in RAM; give it at least one layer's experts"
        )
    hot_lands = not target.is_gpu and ram.nbytes == 0
    hot = plan_tier(vram.nbytes, manifest, landing=hot_lands).nbytes
    warm = plan_tier(ram.nbytes, manifest, landing=not hot_lands).nbytes
    return Tiers(hot, warm), (vram.reason, ram.reason)


def _vram(request: Request, target: Target, shape: Shape) -> Budget:
    if target.device is None:
        if request.vram == "auto" or request.vram.endswith("%"):
            raise UsageError(
                f"--vram {request.vram}: the assumed GPU's size is not known; say what is left for "
                "experts, like --vram 16GiB"
            )
        return resolve_vram(request.vram, "gpu")
    if target.device.type == "cpu":
        return resolve_vram(request.vram, "cpu")
    free, total = torch.cuda.mem_get_info(target.device)
    figures = DeviceFigures(total, free, torch.cuda.get_device_name(target.device))
    kv = int(shape.kv_bytes(request.context))
    return resolve_device_vram(request.vram, figures, DeviceNeeds(shape.resident_bytes, kv))


# -- other codecs -----------------------------------------------------------------------------


def _recoded(
    codecs: Iterable[str],
    scene: Scene,
    manifest: Manifest,
    looked_up: Collection[str],
    kv: tuple[float, float],
    known: Known,
    machine: Machine,
) -> dict[str, Scene]:
    """The scene with the store in each of `codecs`; `manifest` is in the source's own."""
    scenes = {}
    for codec in codecs:
        other = manifest if codec == codecs_of(manifest) else recode(manifest, codec)
        rates = scene.rates
        if known.sources.get("cpu") == MEASURED:
            rates = replace(rates, cpu=machine.kernels(typical(other)))
        shape = shape_of(other, looked_up, *kv)
        scenes[codec] = replace(scene, shape=shape, rates=rates)
    return scenes
