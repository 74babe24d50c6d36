"""Decode the fixed token stream with transformers and accelerate's disk offload, once, in this
process: an arm of `tierrun bench peers`. Prints one JSON document.

Two device maps: `auto` is accelerate's own choice for `max_memory`; `experts` is made by hand, as
good as it gets: everything in memory except the experts.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tierrun.bench.decode import PROMPT_TOKENS
from tierrun.bench.peak import peak_rss
from tierrun.bench.report import run_script
from tierrun.bench.stream import token_stream
from tierrun.bench.synthetic_models import Routing
from tierrun.engine.architecture import build_meta, experts_modules, read_config


class Map(StrEnum):
    """Who decides what lies on the disk."""

    AUTO = "auto"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class OffloadedRun:
    """The measured tokens of one run; `read_bytes` from the drive, per token."""

    load_seconds: float
    seconds: list[float]
    read_bytes: float
    peak_rss: int
    on_disk: int
    in_memory: int

    @property
    def tokens_per_second(self) -> float:
        return len(self.seconds) / sum(self.seconds)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "OffloadedRun":
        return OffloadedRun(**json.loads(text))


def load(checkpoint: Path, offload: Path, map_: Map, ram: str, implementation: str) -> Any:
    """The model, in bf16 as stored, dispatched by accelerate."""
    placed: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": ram}}
    if map_ is Map.EXPERTS:
        placed = {"device_map": _experts_on_disk(checkpoint)}
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    return from_pretrained(
        checkpoint,
        dtype=torch.bfloat16,
        offload_folder=offload,
        experts_implementation=implementation,
        **placed,
    )


def _experts_on_disk(checkpoint: Path) -> dict[str, str]:
    model: PreTrainedModel = build_meta(read_config(checkpoint))
    experts = set(experts_modules(model))
    leaves = [path for path, module in model.named_modules() if not list(module.children())]
    inside = tuple(f"{path}." for path in experts)
    rest = [path for path in leaves if path not in experts and not path.startswith(inside)]
    return dict.fromkeys(rest, "cpu") | dict.fromkeys(experts, "disk")


def decode(
    model: Any, warmup: int, tokens: int, routing: Routing = Routing.SEED
) -> tuple[list[float], float]:
    """Seconds of each of `tokens` tokens, and bytes read from the drive per token.

    Prompt and warm-up go before them a few tokens at a time: `batched_mm` copies the experts of
    every token, and is killed with a long prompt.
    """
    prompt = PROMPT_TOKENS + warmup
    stream = token_stream(prompt + tokens, model.config.vocab_size, routing=routing)
    cache, seconds = None, []
    with torch.inference_mode():
        for first in range(0, prompt, PROMPT_TOKENS):
            chunk = stream[first : min(first + PROMPT_TOKENS, prompt)]
            cache, _ = _forward(model, cache, chunk)
        before = _read_bytes()
        for token in stream[prompt:]:
            cache, elapsed = _forward(model, cache, [token])
            seconds.append(elapsed)
    return seconds, (_read_bytes() - before) / tokens


def _forward(model: Any, cache: Any, tokens: list[int]) -> tuple[Any, float]:
    started = time.perf_counter()
    output = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    return output.past_key_values, time.perf_counter() - started


def _read_bytes() -> int:
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def main(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint's directory.")],
    offload: Annotated[Path, typer.Argument(help="Directory for the offloaded weights.")],
    map_: Annotated[Map, typer.Option("--map", help="The device map.")] = Map.AUTO,
    ram: Annotated[str, typer.Option(help="max_memory of the CPU, for --map auto.")] = "1GiB",
    implementation: Annotated[str, typer.Option(help="Of the experts.")] = "batched_mm",
    warmup: Annotated[int, typer.Option(help="Tokens of the stream in the prompt.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens measured.")] = 4,
    routing: Annotated[Routing, typer.Option(help="Of the stream.")] = Routing.SEED,
    threads: Annotated[int, typer.Option(help="0: torch's own choice.")] = 0,
) -> None:
    """Decode a fixed stream of tokens with accelerate's disk offload; prints JSON."""
    quiet: Callable[[], None] = logging.disable_progress_bar
    quiet()
    if threads:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    model = load(checkpoint, offload, map_, ram, implementation)
    load_seconds = time.perf_counter() - started
    seconds, read_bytes = decode(model, warmup, tokens, routing)
    places = [str(place) for place in model.hf_device_map.values()]
    run = OffloadedRun(
        load_seconds, seconds, read_bytes, peak_rss(), places.count("disk"), places.count("cpu")
    )
    print(run.to_json())


if __name__ == "__main__":
    run_script(main)
