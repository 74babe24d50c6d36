"""The demo model's card, README.md, filled in with what the run measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TEMPLATE = """\
---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, demo]
---

# tierrun demo model

A Mixture-of-Experts language model of {num_parameters:,} parameters (`Qwen3MoeForCausalLM`: 6
layers, all sparse, 32 experts of width 80 each, 4 per token, hidden size 256, a byte-level BPE
vocabulary of 4096 tokens, 2048 positions, bf16). It exists so that tierrun's commands and tests
have a real architecture with *learnt* routing at hand, offline, in {megabytes:.0f} MB. It writes
text that looks like Python or like Python's documentation. It knows nothing and is not for use.

## Data and licence

CPython 3.13.5's source tree: the standard library's and tools' Python files (data tables, and
files over 160 kB, left out), its tests, the documentation's reStructuredText with roles and index
entries spelled out or removed, and the change notes. Prose, library code and tests make up 50 %,
30 % and 20 % of the tokens trained on. The data is under the Python Software Foundation License,
of which LICENSE-PSF.txt is a copy; some files of the standard library name further authors. The
model can reproduce passages of it, so treat the weights as under that licence too.

## Training

{minutes:.1f} minutes on one NVIDIA H200: {steps:,} steps, {tokens:,} tokens (a corpus of
{corpus_tokens:,} tokens, seen many times, with dropout {dropout}), AdamW, cosine schedule,
bf16 autocast, sequences of 512, then 1024 and 2048 tokens, a load-balancing loss of weight
{balance}. The weights are those of the best held-out loss, reached after {kept_at:.0%} of the
time. To make it again:

    python -m tierrun.tools.demo.corpus Python-3.13.5 .corpus
    python -m tierrun.tools.demo.train .corpus tools/demo/checkpoint --minutes {minutes:.1f}

## Measured

Held-out documents, the saved bf16 weights, transformers' own forward:

| text | loss (nats per token) | perplexity |
| --- | --- | --- |
{losses}

The same documents make the routing's skew: of all activations, the most used

| (layer, expert) pairs | take |
| --- | --- |
{curve}

{num_rare} of {num_pairs} pairs get less than a tenth of an even share.

## What it writes

The first of each pair is greedy, the second sampled (temperature 0.7, top-p 0.95).

{completions}

## Limits

It continues text; it follows no instructions and has no chat template. Most statements that it
makes are false. The held-out documents also chose the weights to keep, so the losses are slightly
flattered, and the documentation quotes the library's docstrings, so some held-out passages occur
in the training text.
"""


@dataclass(frozen=True)
class Result:
    """A run's figures; those below `kept_at` are measured on the saved model."""

    dropout: float
    balance: float
    corpus_tokens: int
    steps: int
    tokens: int
    minutes: float
    kept_at: float
    num_parameters: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)
    curve: Mapping[float, float] = field(default_factory=dict)
    num_rare: int = 0
    num_pairs: int = 0
    completions: Sequence[str] = ()


def card(result: Result) -> str:
    return TEMPLATE.format(
        num_parameters=result.num_parameters,
        megabytes=2 * result.num_parameters / 1e6,
        minutes=result.minutes,
        corpus_tokens=result.corpus_tokens,
        steps=result.steps,
        tokens=result.tokens,
        dropout=result.dropout,
        balance=result.balance,
        kept_at=result.kept_at,
        losses="\n".join(
            f"| {domain} | {loss:.3f} | {math.exp(loss):.1f} |"
            for domain, loss in result.losses.items()
        ),
        curve="\n".join(f"| {pairs:.0%} | {taken:.1%} |" for pairs, taken in result.curve.items()),
        num_rare=result.num_rare,
        num_pairs=result.num_pairs,
        completions="\n\n".join(f"```text\n{text.rstrip()}\n```" for text in result.completions),
    )
