"""Trains the demo model on one GPU within ten minutes.

    python -m tierrun.tools.demo.corpus Python-3.13.5 .corpus
    python -m tierrun.tools.demo.train .corpus tools/demo/checkpoint --minutes 3.8

The learning rate and the sequence length follow the clock, not the step, so that a run ends when
it should on any machine. The weights kept are those of the best held-out loss, looked at twelve
times on the way; the figures reported are of the saved bf16 model under transformers' forward.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import AutoTokenizer, Qwen3MoeForCausalLM, set_seed

from tierrun.tools.demo.card import Result, card
from tierrun.tools.demo.measure import (
    PROMPTS,
    Decisions,
    completion,
    held_out_loss,
    rare_experts,
    usage_counts,
    usage_curve,
    watched_routers,
)
from tierrun.tools.demo.model import add_dropout, load, new_model, save

SHARES = {"prose": 0.5, "code": 0.3, "tests": 0.2}
LENGTHS = ((0.0, 512), (0.6, 1024), (0.85, 2048))


@dataclass(frozen=True)
class Recipe:
    minutes: float
    tokens_per_step: int = 49152
    peak_rate: float = 2.5e-3
    last_rate: float = 2.5e-5
    warm_up_steps: int = 300
    weight_decay: float = 0.1
    dropout: float = 0.15
    balance: float = 1e-3
    num_looks: int = 12
    max_steps: int = 1_000_000

    def rate(self, steps: int, done: float) -> float:
        """The learning rate: half a cosine over the time, warmed up over the first steps."""
        height = 0.5 + 0.5 * math.cos(math.pi * done)
        rate = self.last_rate + (self.peak_rate - self.last_rate) * height
        return rate * min(1.0, (steps + 1) / self.warm_up_steps)

    def length(self, done: float) -> int:
        return max(length for since, length in LENGTHS if done >= since)


@dataclass(frozen=True)
class Streams:
    """The corpus on the device, by domain."""

    train: Mapping[str, Tensor]
    held: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path, device: torch.device) -> "Streams":
        with np.load(path) as arrays:
            tensors = {
                name: torch.from_numpy(arrays[name].astype(np.int64)).to(device)
                for name in arrays.files
            }
        return cls(
            train={domain: tensors[f"{domain}_train"] for domain in SHARES},
            held={domain: tensors[f"{domain}_held"] for domain in SHARES},
        )

    def batch(self, rows: int, length: int) -> Tensor:
        """Windows that start anywhere, each domain with its share of the rows."""
        parts = []
        for domain, share in SHARES.items():
            stream = self.train[domain]
            last_start = len(stream) - length - 1
            starts = torch.randint(last_start, (round(share * rows),), device=stream.device)
            parts.append(stream[starts[:, None] + torch.arange(length + 1, device=stream.device)])
        return torch.cat(parts)


@dataclass
class Best:
    """The weights of the lowest held-out loss so far."""

    loss: float = math.inf
    done: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, model: nn.Module, loss: float, done: float) -> None:
        if loss < self.loss:
            self.loss, self.done = loss, done
            self.weights = {name: w.detach().clone() for name, w in model.state_dict().items()}


def new_optimizer(model: Qwen3MoeForCausalLM, recipe: Recipe) -> Optimizer:
    """AdamW; norms' weights do not decay."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=weights[0].is_cuda)


def balance_loss(seen: Decisions) -> Tensor:
    """The Switch Transformer's balancing loss, a mean over layers: 1 where usage is even."""
    losses = []
    for logits, chosen in zip(seen.logits, seen.chosen, strict=True):
        probability = logits.float().softmax(-1).mean(0)
        used = torch.zeros_like(logits, dtype=torch.float32).scatter(1, chosen, 1.0).mean(0)
        losses.append(len(used) / chosen.shape[1] * used @ probability)
    return torch.stack(losses).mean()


def step(
    model: Qwen3MoeForCausalLM, optimizer: Optimizer, seen: Decisions, batch: Tensor, balance: float
) -> Tensor:
    """One update; returns the language loss, still on the device."""
    seen.clear()
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        total = loss + balance * balance_loss(seen)
    torch.autograd.backward(total)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def look(model: Qwen3MoeForCausalLM, held: Mapping[str, Tensor], recipe: Recipe) -> float:
    """The held-out loss of the training mixture, printed by domain."""
    model.train(False)
    with torch.autocast(model.device.type, torch.bfloat16):
        rows = max(1, recipe.tokens_per_step // 1024)
        losses = {domain: held_out_loss(model, stream, rows) for domain, stream in held.items()}
    model.train()
    print("held out:", " ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return sum(SHARES[domain] * loss for domain, loss in losses.items())


def train(model: Qwen3MoeForCausalLM, streams: Streams, recipe: Recipe) -> Result:
    """Trains until the time is over and leaves the best weights in the model."""
    optimizer, best = new_optimizer(model, recipe), Best()
    add_dropout(model, recipe.dropout)
    model.train()
    steps, tokens, looks, started = 0, 0, 0, perf_counter()
    with watched_routers(model) as seen:
        while (done := (perf_counter() - started) / (60 * recipe.minutes)) < 1:
            if done > (looks + 1) / recipe.num_looks:
                looks += 1
                best.offer(model, look(model, streams.held, recipe), done)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(steps, done)
            length = recipe.length(done)
            batch = streams.batch(recipe.tokens_per_step // length, length)
            loss = step(model, optimizer, seen, batch, recipe.balance)
            steps, tokens = steps + 1, tokens + batch[:, 1:].numel()
            if steps % 200 == 0:
                pace = tokens / (perf_counter() - started)
                print(f"{done:5.1%} step {steps} loss {loss.item():.4f} {pace:,.0f} tokens/s")
            if steps == recipe.max_steps:
                break
    best.offer(model, look(model, streams.held, recipe), min(done, 1.0))
    model.load_state_dict(best.weights)
    minutes = (perf_counter() - started) / 60
    return Result(
        dropout=recipe.dropout,
        balance=recipe.balance,
        corpus_tokens=sum(len(stream) for stream in streams.train.values()),
        steps=steps,
        tokens=tokens,
        minutes=minutes,
        kept_at=best.done,
    )


def measured(out: Path, device: torch.device, held: Mapping[str, Tensor], result: Result) -> Result:
    """The result with the saved model's figures: what a user's transformers makes of it."""
    model, tokenizer = load(out, device)
    counts = usage_counts(model, held)
    return replace(
        result,
        num_parameters=model.num_parameters(),
        losses={domain: held_out_loss(model, stream) for domain, stream in held.items()},
        curve=usage_curve(counts),
        num_rare=rare_experts(counts),
        num_pairs=counts.numel(),
        completions=[
            completion(model, tokenizer, prompt, sampled)
            for prompt in PROMPTS
            for sampled in (False, True)
        ],
    )


def main(
    corpus: Path,
    out: Path,
    minutes: float = 3.8,
    dropout: float = 0.15,
    balance: float = 1e-3,
    tokens_per_step: int = 49152,
    max_steps: Annotated[int, typer.Option(help="Stop after so many steps; for a dry run.")] = 10
    ** 6,
) -> None:
    """Train on the folder CORPUS that `tierrun.tools.demo.corpus` made; save the model in OUT."""
    set_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    streams = Streams.read(corpus / "tokens.npz", device)
    model = new_model(tokenizer, device)
    recipe = Recipe(
        minutes,
        dropout=dropout,
        balance=balance,
        tokens_per_step=tokens_per_step,
        max_steps=max_steps,
    )
    result = train(model, streams, recipe)
    save(model, tokenizer, corpus, out)
    result = measured(out, device, streams.held, result)
    (out / "README.md").write_text(card(result), "utf-8")
    print(result)
    print(*result.completions, sep="\n\n--------\n\n")


if __name__ == "__main__":
    typer.run(main)
