"""The fixed stream of tokens that every arm of a comparison is fed.

Greedy decoding of random weights falls into cycles, and independent tokens have no locality in
time; text has it, because its topic drifts. So each token has a Zipf weight, 1/rank in a random
order, times exp(d), where d is the token's own Ornstein-Uhlenbeck drift: standard deviation 2,
forgotten over 64 tokens. Tokens are drawn from that moving distribution.

Two streams of another kind go with stores that route otherwise (`tierrun.bench.synthetic_models`).
`local` has no ranks and a drift of 7: no token is frequent in the long run, but an LRU cache of an
eighth of the experts has two thirds of what is wanted next (traces of Qwen3.8 on llama.cpp#27861:
67 %). `uniform` has independent tokens, all equally likely: llama-bench's kind.
"""

from typing import Any, NamedTuple

import numpy as np

from tierrun.bench.synthetic_models import Routing

DRIFT_TOKENS = 64


class _Drift(NamedTuple):
    """How much ranks count (0: not at all), and the standard deviation of the drift."""

    zipf: float
    deviation: float


_DRIFTS = {Routing.SEED: _Drift(1.0, 2.0), Routing.LOCAL: _Drift(0.0, 7.0)}


def token_stream(
    count: int, vocabulary: int, seed: int = 0, routing: Routing = Routing.SEED
) -> list[int]:
    """`count` token ids; the same for the same arguments, and a prefix of any longer stream."""
    random = np.random.default_rng(seed)
    if routing is Routing.UNIFORM:
        return [int(random.random() * vocabulary) for _ in range(count)]
    ranks, deviation = _DRIFTS[routing]
    zipf = -ranks * np.log1p(random.permutation(vocabulary))
    drift = random.normal(0.0, deviation, vocabulary)
    keep = np.exp(-1.0 / DRIFT_TOKENS)
    renew = deviation * np.sqrt(1.0 - keep * keep)
    tokens = []
    for _ in range(count):
        weights = np.exp(zipf + drift)
        place = random.random() * weights.sum()
        tokens.append(int(np.searchsorted(np.cumsum(weights), place)))
        drift = keep * drift + renew * random.normal(0.0, 1.0, vocabulary)
    return tokens


def routing_of(config: Any) -> Routing:
    """How the model with this configuration is meant to route; `seed` where it does not say."""
    return Routing(getattr(config, "tierrun_routing", Routing.SEED))
