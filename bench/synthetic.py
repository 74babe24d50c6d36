"""A synthetic Mixture of Experts, its routing as skewed as a trained one's, for several engines.

Random weights route uniformly: every cache then hits c/N and nothing can be learnt. Here the
embedding has a constant dimension and every router reads a popularity from it:

- embedding rows N(0, 1), dimension 0 is 8 for every token. After RMSNorm each hidden state has the
  constant component 8/rms there, rms = sqrt((64 + H)/H);
- router row of expert e: N(0, 1)·rms/√H in every dimension, and b_e·rms/8 in dimension 0, where
  b_e ~ N(0, sigma) is the expert's popularity (sigma 2.1 fits 64 experts, top-8);
- norms 1; all other matrices N(0, 0.02), as shifted windows of one random buffer: speed does not
  depend on their values, and so the files are written as fast as the disk takes them.

`tierrun bench store --peers` makes the same weights in every form that `tierrun bench peers` needs:
`model.gguf` for llama.cpp, `store/` for tierrun, and in bf16 `checkpoint/` (Hugging Face, sharded,
no tokenizer) for accelerate.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tierrun.bench.checkpoint import Shape, build_checkpoint
from tierrun.bench.stream import routing_of, token_stream
from tierrun.bench.synthetic_gguf import check_codec, gguf_nbytes, write_gguf
from tierrun.bench.synthetic_models import Routing
from tierrun.engine.architecture import read_config
from tierrun.engine.engine import load
from tierrun.io.errors import DiskFullError, UsageError
from tierrun.io.extent import format_bytes
from tierrun.io.store import MODEL_DIR, Manifest
from tierrun.tiers.usage import top_shares
from tierrun.tools.convert import convert

PERCENTS = (1.0, 5.0, 10.0, 15.0, 20.0, 40.0)
"""Where the skew curve is told."""


class PeerFiles(NamedTuple):
    """Where the forms of one model lie."""

    store: Path
    gguf: Path
    checkpoint: Path

    @staticmethod
    def under(directory: Path) -> "PeerFiles":
        return PeerFiles(directory / "store", directory / "model.gguf", directory / "checkpoint")


def build_for_peers(
    directory: Path,
    shape: Shape,
    codec: str,
    seed: int = 0,
    *,
    force: bool = False,
    routing: Routing = Routing.SEED,
) -> Manifest:
    """Make all forms of one model in `directory`; what the store's holds.

    Raises:
        UsageError: no such codec, one that cannot hold it, no room, or a model there already.
    """
    check_codec(codec, shape)
    files = PeerFiles.under(directory)
    if not force and any(path.exists() for path in files):
        raise UsageError(f"{directory} holds a model, or parts of one; use --force to replace it")
    _remove(files)
    directory.mkdir(parents=True, exist_ok=True)
    forms = 3 if codec == "bf16" else 2
    needed, free = forms * gguf_nbytes(shape, codec), shutil.disk_usage(directory).free
    if free < needed:
        raise DiskFullError(
            f"{directory}: {forms} forms of the model need {format_bytes(needed)}, "
            f"{format_bytes(free)} free"
        )
    try:
        if codec == "bf16":
            build_checkpoint(files.checkpoint, shape, seed)
        write_gguf(files.gguf, shape, codec, seed)
        manifest = convert(files.checkpoint if codec == "bf16" else files.gguf, files.store)
    except BaseException:  # Ctrl-C too: parts of a model are of no use
        _remove(files)
        raise
    _say_routing(files.store / MODEL_DIR / "config.json", routing)
    return manifest


def _remove(files: PeerFiles) -> None:
    files.gguf.unlink(missing_ok=True)
    for directory in (files.store, files.checkpoint):
        shutil.rmtree(directory, ignore_errors=True)


def _say_routing(path: Path, routing: Routing) -> None:
    config = json.loads(path.read_text()) | {"tierrun_routing": routing}
    path.write_text(json.dumps(config, indent=2) + "\n")


def skew(store: Path, tokens: int, vocabulary: int, ram: str = "1GiB") -> list[float]:
    """The share of activations, mean over layers, that the top `PERCENTS` of experts take."""
    routing = routing_of(read_config(store / MODEL_DIR))
    with load(store, ram=ram, ubatch=tokens, device="cpu") as engine:
        engine.session().prefill(token_stream(tokens, vocabulary, seed=1, routing=routing))
        curves = [top_shares(row.numpy(), PERCENTS) for row in engine.hook.usage]
    return [sum(column) / len(column) for column in zip(*curves, strict=True)]
