"""`tierrun demo`: the model that comes with tierrun, converted and run with most of it on disk."""

import os
from pathlib import Path

import numpy as np
from rich.console import Console

from tierrun.engine.engine import Engine, load
from tierrun.io.extent import format_bytes
from tierrun.io.store import Manifest
from tierrun.tiers.usage import UsageFile
from tierrun.tools.convert import convert
from tierrun.tools.generate import Request, answer_to, write_raw
from tierrun.tools.progress import progress_bar
from tierrun.tools.sources.safetensors import Checkpoint
from tierrun.tools.stats import table

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROMPTS = ("def read_lines(path):\n", "The following functions return")

_SHARE_PER_TIER = 0.2
_SEED = 7


def run_demo(directory: Path | None, predict: int) -> None:
    """Convert the packaged checkpoint into `directory` and continue a code and a prose prompt.

    The hot and the warm tier hold a fifth of the experts each; the rest is read as it is needed.
    """
    console = Console()
    directory = directory or _cache_directory() / _checkpoint_name()
    with progress_bar("converting") as progress:
        manifest = convert(CHECKPOINT, directory, progress=progress)
    budget = tier_budget(manifest)
    console.print(
        f"{manifest.num_experts} experts, {format_bytes(manifest.expert_bytes)}, in {directory}; "
        f"hot and warm tier: {format_bytes(budget)} each",
        highlight=False,
        soft_wrap=True,
    )
    # On the CPU everywhere, so that it looks the same and needs nothing.
    with load(directory, vram=str(budget), ram=str(budget), device="cpu") as engine:
        for prompt in PROMPTS:
            _show(engine, prompt, predict, console)
    console.print()
    console.print(table(UsageFile(directory, manifest).read()))


def tier_budget(manifest: Manifest) -> int:
    """Bytes that hold a fifth of the experts."""
    largest = max(c.nbytes for c in manifest.classes)
    return int(np.ceil(_SHARE_PER_TIER * manifest.num_experts)) * largest


def _show(engine: Engine, prompt: str, predict: int, console: Console) -> None:
    assert engine.tokenizer is not None, "the demo checkpoint has a tokenizer"
    console.rule()
    write_raw(console, prompt)
    request = Request(predict, engine.defaults.sampling(seed=_SEED))
    ids: list[int] = engine.tokenizer(prompt)["input_ids"]
    answer_to(engine, ids, request, console, engine.session())


def _checkpoint_name() -> str:
    """A name of its own for each version of the demo model."""
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        return f"demo-{checkpoint.fingerprint()[:8]}"


def _cache_directory() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "tierrun"
