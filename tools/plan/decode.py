"""How long one token takes: numbers in, seconds out. docs/plan.md says where every number is from.

Experts layers follow one another; what the drive must give is waited for within a layer, beside the
compute of what is there. How many experts of a layer are missing varies from token to token, so the
expectation is taken over that number (binomial), not of its mean.
"""

from math import comb

from tierrun.tools.plan.hits import Hits
from tierrun.tools.plan.rates import Rates
from tierrun.tools.plan.shape import Experts, Shape
from tierrun.tools.plan.times import Times

GPU_DENSE, GPU_PACKED = 0.8, 0.4
"""Of the memory's bandwidth, what decode kernels reach with experts of 2048 × 512 to 768."""


def decode_times(shape: Shape, hits: Hits, rates: Rates, context: int) -> Times:
    """One token after `context` others."""
    place = _gpu_layer if rates.has_gpu else _cpu_layer
    total = _rest(shape, rates, context)
    for layer in shape.layers:
        total += place(layer, shape, hits, rates)
    return total


def _rest(shape: Shape, rates: Rates, context: int) -> Times:
    """What all layers take whatever is routed: resident weights, the context, and overhead."""
    kv = shape.kv_bytes(context)
    overhead = rates.overhead * len(shape.layers)
    if not rates.has_gpu:
        cpu = shape.resident_read / rates.cpu_resident + kv / rates.memory
        return Times(cpu=cpu, overhead=overhead)
    efficiency = GPU_PACKED if shape.resident_packed else GPU_DENSE
    vram = shape.resident_read / (efficiency * rates.vram) + kv / rates.vram
    return Times(vram=vram, overhead=overhead)


def _cpu_layer(layer: Experts, shape: Shape, hits: Hits, rates: Rates) -> Times:
    one = layer.nbytes / rates.cpu
    compute = layer.top_k * one
    return Times(cpu=compute, drive=_waited(layer, hits, rates, one, compute))


def _gpu_layer(layer: Experts, shape: Shape, hits: Hits, rates: Rates) -> Times:
    """Experts that came from the drive lie in RAM, and are computed from there."""
    efficiency = GPU_PACKED if shape.packed else GPU_DENSE
    used = layer.top_k * layer.nbytes
    there = hits.hot * used / (efficiency * rates.vram)
    over = (hits.warm + hits.cold) * used / rates.in_place
    return Times(vram=there, pcie=over, drive=_waited(layer, hits, rates, 0.0, 0.0))


def _waited(layer: Experts, hits: Hits, rates: Rates, one: float, compute: float) -> float:
    """Seconds beyond `compute` until the last of the missing experts was read and computed."""
    total = 0.0
    for missing in range(1, layer.top_k + 1):
        reading = rates.latency + missing * layer.nbytes / rates.drive + one
        total += _chance(missing, layer.top_k, hits.cold) * max(0.0, reading - compute)
    return total


def _chance(missing: int, of: int, each: float) -> float:
    """Of `of` lookups, exactly `missing` miss."""
    return comb(of, missing) * each**missing * (1.0 - each) ** (of - missing)
