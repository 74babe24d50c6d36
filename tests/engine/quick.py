"""Engines on the CPU whose tokens are computed in few compiled calls."""

from pathlib import Path
from typing import Any

import torch
from tests.engine.conftest import PROMPT

import tierrun
from tierrun.engine.engine import Engine

TOKENS = PROMPT[:12]


def opened(store: Path, **options: Any) -> Engine:
    """With room for all experts, if no other is asked for."""
    return tierrun.load(store, **{"ram": "1GiB", "device": "cpu"} | options)


def fed(engine: Engine) -> torch.Tensor:
    """Logits after each of TOKENS, one at a time."""
    session = engine.session()
    return torch.stack([session.prefill([token]) for token in TOKENS])
