"""What the demo model is worth: held-out loss, how skewed its routing is, what it writes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3MoeForCausalLM

SHARES_OF_PAIRS = (0.01, 0.05, 0.10, 0.15, 0.20, 0.40)
PROMPTS = ("def read_lines(path):\n", "The following functions return")


@dataclass
class Decisions:
    """What the routers decided since the last `clear`, one entry a layer and forward."""

    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        self.logits.clear()
        self.chosen.clear()


@contextmanager
def watched_routers(model: Qwen3MoeForCausalLM) -> Iterator[Decisions]:
    """Records every router's decisions while it is open."""
    seen = Decisions()

    def record(_module: nn.Module, _args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _weights, chosen = output
        seen.logits.append(logits)
        seen.chosen.append(chosen)

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    handles = [router.register_forward_hook(record) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def windows(stream: Tensor, length: int, rows: int) -> Iterator[Tensor]:
    """The stream cut into batches of rows; every token but the first is predicted once."""
    usable = (len(stream) - 1) // length * length
    starts = torch.arange(0, usable, length, device=stream.device)
    for some in torch.split(starts, rows):
        yield stream[some[:, None] + torch.arange(length + 1, device=stream.device)]


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, stream: Tensor, rows: int = 16) -> float:
    """The mean loss per token, in nats, over windows of 1024 tokens (or the stream's length)."""
    total, count = torch.zeros((), device=stream.device), 0
    for batch in windows(stream, min(1024, len(stream) - 1), rows):
        logits = model(batch[:, :-1], use_cache=False).logits
        targets = batch[:, 1:].flatten()
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
        count += len(targets)
    return total.item() / count


def usage_counts(model: Qwen3MoeForCausalLM, streams: Mapping[str, Tensor]) -> Tensor:
    """How many tokens each expert of each layer was given, [layer, expert]."""
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    counts = torch.zeros(layers, experts, dtype=torch.long)
    with watched_routers(model) as seen:
        for stream in streams.values():
            held_out_loss(model, stream)
            for number, chosen in enumerate(seen.chosen):
                counts[number % layers] += chosen.flatten().cpu().bincount(minlength=experts)
            seen.clear()
    return counts


def usage_curve(counts: Tensor) -> dict[float, float]:
    """The share of all activations that the most used shares of (layer, expert) pairs take."""
    ranked = counts.flatten().sort(descending=True).values.double()
    taken = ranked.cumsum(0) / ranked.sum()
    return {share: _at(taken, share * len(ranked)) for share in SHARES_OF_PAIRS}


def _at(taken: Tensor, pairs: float) -> float:
    whole = int(pairs)
    below = taken[whole - 1].item() if whole else 0.0
    return below + (pairs - whole) * (taken[whole].item() - below)


def rare_experts(counts: Tensor) -> int:
    """How many (layer, expert) pairs get under a tenth of an even share."""
    even = counts.sum(1, keepdim=True) / counts.shape[1]
    return int((counts < 0.1 * even).sum())


def completion(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, sampled: bool
) -> str:
    """The prompt and what the model writes after it; greedy, or as generation_config.json says."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    choice = {} if sampled else {"do_sample": False, "temperature": None, "top_p": None}
    ids = cast(Any, model).generate(**inputs, max_new_tokens=160, **choice)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))
