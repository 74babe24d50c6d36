"""All that lets a model compute a token in few compiled calls on the CPU; not with `--exact`.

Modules that are recognised are computed by kernels, each in one call, and one at a time; the others
go on as transformers has them. Of prompts only norms are computed so.
"""

import logging
import os
from typing import Any

from tierrun.engine.host.attention import quicken_attention
from tierrun.engine.host.layers import quicken_layers
from tierrun.engine.host.linears import quicken_linears
from tierrun.engine.host.norms import quicken_norms
from tierrun.engine.host.routers import quicken_routers
from tierrun.engine.kernels.int8_linear import Int8Linear
from tierrun.engine.kernels.workers import workers

log = logging.getLogger(__name__)


def quicken(model: Any, kernels: Int8Linear, threads: int) -> bool:
    """Let `model` compute tokens so, with as many `threads` as `kernels`; whether no linear module
    is left to torch."""
    shared = workers(max(1, min(threads, len(os.sched_getaffinity(0)))))
    taken, left = quicken_linears(model, kernels, shared)
    if not taken:  # nothing is packed: all stays as transformers computes it
        return False
    norms, routers = quicken_norms(model, shared), quicken_routers(model, shared)
    heads = quicken_attention(model, shared)
    layers = quicken_layers(model)
    log.info(
        "compiled calls for a token: %d whole layers, %d attention modules, %d linear ones (%d "
        "left to torch), %d norms, %d routers",
        layers,
        heads,
        taken,
        left,
        norms,
        routers,
    )
    return left == 0
