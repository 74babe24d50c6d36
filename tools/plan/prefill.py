"""How long a prompt takes, chunk by chunk: each chunk reads what it wants of every layer once."""

from tierrun.tools.plan.hits import Tiers, distinct
from tierrun.tools.plan.rates import Rates
from tierrun.tools.plan.routing import Routing
from tierrun.tools.plan.shape import Shape
from tierrun.tools.plan.times import Times

CPU_CHUNK, GPU_CHUNK = 512, 2048
"""Tokens at once: the CPU's default, and what fills a GPU's kernels (tiers/chunking.py)."""

GPU_EFFICIENCY = 0.08
"""Of torch's fp16 products, what whole prompts reach: 6 to 10 % measured on an H100."""


def prefill_times(shape: Shape, tiers: Tiers, routing: Routing, rates: Rates, tokens: int) -> Times:
    """One chunk of `tokens`, the experts' tiers full of what decode wants."""
    lookups = sum(layer.top_k for layer in shape.layers) * len(routing.popularity)
    per_token = lookups / sum(layer.count for layer in shape.layers)
    hot = min(1.0, tiers.hot / shape.expert_bytes)
    both = min(1.0, (tiers.hot + tiers.warm) / shape.expert_bytes)
    wanted, cold, over = (
        shape.expert_bytes * distinct(routing, per_token, tokens, kept) for kept in (0.0, both, hot)
    )
    weights = sum(layer.top_k * layer.weights for layer in shape.layers) + shape.resident_weights
    reading = cold / rates.drive
    if rates.has_gpu:
        compute = 2 * weights * tokens / (GPU_EFFICIENCY * rates.gpu_flops)
        return _overlapped(Times(gpu=compute), Times(pcie=over / rates.pcie), Times(drive=reading))
    widening = wanted / rates.cpu + shape.resident_read / rates.cpu_resident
    compute = widening + 2 * weights * tokens / rates.cpu_flops
    return _overlapped(Times(cpu=compute), Times(drive=reading))


def _overlapped(*parts: Times) -> Times:
    """What is done at the same time takes as long as the longest of it."""
    return max(parts, key=lambda part: part.total)
