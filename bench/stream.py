"""The fixed stream of tokens that every arm of a comparison is fed.

Greedy decoding of random weights falls into cycles, and independent tokens have no locality in
time; text has it, because its topic drifts. So each token has a Zipf weight, 1/rank in a random
order, times exp(d), where d is the token's own Ornstein-Uhlenbeck drift: standard deviation 2,
forgotten over 64 tokens. Tokens are drawn from that moving distribution.
"""

import numpy as np

DRIFT_TOKENS = 64
DRIFT_DEVIATION = 2.0


def token_stream(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """`count` token ids; the same for the same arguments, and a prefix of any longer stream."""
    random = np.random.default_rng(seed)
    zipf = -np.log1p(random.permutation(vocabulary))
    drift = random.normal(0.0, DRIFT_DEVIATION, vocabulary)
    keep = np.exp(-1.0 / DRIFT_TOKENS)
    renew = DRIFT_DEVIATION * np.sqrt(1.0 - keep * keep)
    tokens = []
    for _ in range(count):
        weights = np.exp(zipf + drift)
        place = random.random() * weights.sum()
        tokens.append(int(np.searchsorted(np.cumsum(weights), place)))
        drift = keep * drift + renew * random.normal(0.0, 1.0, vocabulary)
    return tokens
