"""What all arms of `tierrun bench peers` share: the model, the memory, and how much is asked."""

import os
from dataclasses import dataclass
from pathlib import Path

from tierrun.bench.stream import routing_of
from tierrun.bench.synthetic import PeerFiles
from tierrun.bench.synthetic_models import Routing
from tierrun.engine.architecture import read_config
from tierrun.io.store import MODEL_DIR


@dataclass(frozen=True, slots=True)
class Setting:
    """`memory` in bytes, None: no cap; `prompt` 0: no prompts; `threads` 0: each program's own
    default. `seconds`: what a run may take. Of tierrun and llama.cpp there is an arm for each set
    of further arguments."""

    directory: Path
    memory: int | None = None
    ram: str = "1GiB"
    vram: str = "auto"
    device: str = "cpu"
    warmup: int = 32
    tokens: int = 32
    prompt: int = 0
    accelerate_tokens: int = 4
    threads: int = 0
    seconds: float = 600.0
    llama_bench: Path | None = None
    llama_arguments: tuple[str, ...] = ("",)
    tierrun_arguments: tuple[str, ...] = ("",)
    arms: tuple[str, ...] | None = None

    @property
    def files(self) -> PeerFiles:
        return PeerFiles.under(self.directory)

    @property
    def stream(self) -> Routing:
        """Of the tokens: llama-bench's where it takes part, else the store's own."""
        if self.llama_bench is not None:
            return Routing.UNIFORM
        return routing_of(read_config(self.files.store / MODEL_DIR))

    @property
    def cold(self) -> str:
        """What the page cache has when an arm begins, in a clause."""
        return (
            "page cache dropped before" if os.geteuid() == 0 else "page cache as it was (no root)"
        )
