"""The same GGUF file in tierrun and in llama.cpp: how far apart are the next tokens' probabilities?

    python -m tierrun.bench.llama_parity FILE.gguf [--other-build DIR] [--llama-quantize PROGRAM]

llama.cpp rounds activations to eight bits before it multiplies them with quantised weights, tierrun
computes in fp32: they cannot agree to the last bit. The yardstick is how far llama.cpp is from
itself: with other threads, other batch sizes (which take other kernels), weights not repacked, keys
and values in f16, and another build (with a BLAS, whose large products are in fp32 like ours). With
`llama-quantize` the file is also expanded to F32: the same numbers, without that rounding.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.table import Table

import tierrun
from tierrun.bench.held_out import held_out_texts
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.io.errors import TierrunError

ARMS: dict[str, Sequence[str]] = {
    "2 threads": ("--threads", "2"),
    "token by token": ("--ubatch", "1"),
    "not repacked": ("--no-repack",),
    "f16 cache": ("--f16-cache",),
}


class Distance(NamedTuple):
    """Between two sets of logits: mean and largest KL divergence (nats), equal first choices."""

    mean: float
    largest: float
    top_1: float


def distance(theirs: torch.Tensor, ours: torch.Tensor) -> Distance:
    """Of next-token distributions, logits [tokens, vocabulary]; KL(theirs ‖ ours)."""
    p, q = (F.log_softmax(logits.double(), dim=-1) for logits in (theirs, ours))
    divergence = (p.exp() * (p - q)).sum(-1)
    agree = (theirs.argmax(-1) == ours.argmax(-1)).double().mean()
    return Distance(divergence.mean().item(), divergence.max().item(), agree.item())


def llama_logits(
    gguf: Path, ids: Sequence[int], options: Sequence[str], build: Path | None
) -> torch.Tensor:
    """What llama.cpp gives for the tokens `ids`, in a process of its own.

    Raises:
        TierrunError: it failed, or the package llama-cpp-python is not there.
    """
    with tempfile.TemporaryDirectory() as name:
        tokens, out = Path(name, "ids.npy"), Path(name, "logits.npy")
        np.save(tokens, np.array(ids))
        files = map(str, (gguf, tokens, out))
        command = [sys.executable, "-m", "tierrun.bench.llama_logits", *files, *options]
        environment = os.environ | ({"LLAMA_CPP_LIB_PATH": str(build)} if build else {})
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            last = run.stderr.strip().splitlines()[-1:] or ["no message"]
            raise TierrunError(f"llama.cpp's process ended with {run.returncode}: {last[0]}")
        return torch.from_numpy(np.load(out))


def expanded_logits(gguf: Path, ids: Sequence[int], llama_quantize: Path) -> torch.Tensor:
    """What llama.cpp gives for the numbers of `gguf` written as F32."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "f32.gguf")
        command = [llama_quantize, "--allow-requantize", gguf, out, "F32"]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if run.returncode:
            raise TierrunError(f"{llama_quantize} ended with {run.returncode} for {gguf}")
        return llama_logits(out, ids, (), None)


def our_logits(gguf: Path, ids: Sequence[int]) -> torch.Tensor:
    """What tierrun gives, from a store made for it."""
    with tempfile.TemporaryDirectory() as store:
        tierrun.convert(gguf, store)
        with tierrun.load(store, device="cpu", exact=True) as engine:
            logits: torch.Tensor = engine.logits(ids)
    return logits


def text_ids(gguf: Path, count: int) -> list[int]:
    """`count` tokens of held-out text, by the demo model's tokenizer (not by the file's)."""
    from transformers import AutoTokenizer

    from tierrun.tools.demo.run import CHECKPOINT

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids: list[int] = []
    for text in held_out_texts():
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= count:
            return ids[:count]
    raise TierrunError(f"only {len(ids)} tokens of held-out text")


def _table(title: str, distances: Mapping[str, Distance]) -> Table:
    table = Table(title=title)
    table.add_column("")
    for name in ("mean KL", "largest KL", "same first choice"):
        table.add_column(name, justify="right")
    for name, each in distances.items():
        table.add_row(name, f"{each.mean:.2e}", f"{each.largest:.2e}", f"{each.top_1:.1%}")
    return table


def main(
    files: Annotated[list[Path], typer.Argument(help="GGUF files.")],
    other_build: Annotated[
        Path | None, typer.Option(help="Folder with the libraries of another build of llama.cpp.")
    ] = None,
    llama_quantize: Annotated[
        Path | None, typer.Option(help="llama.cpp's program, to expand the file with.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Positions compared.")] = 256,
    random: Annotated[
        int, typer.Option(help="Random tokens below this number instead of text; 0: text.")
    ] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the JSON document here.")
    ] = None,
) -> None:
    """Compare next-token distributions with llama.cpp's."""
    console, results = open_console(), {}
    for gguf in files:
        if random:
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, random, (tokens,), generator=generator).tolist()
        else:
            ids = text_ids(gguf, tokens)
        base = llama_logits(gguf, ids, (), None)
        arms = {name: llama_logits(gguf, ids, options, None) for name, options in ARMS.items()}
        if other_build is not None:
            arms["other build"] = llama_logits(gguf, ids, (), other_build)
        ours = our_logits(gguf, ids)
        own = {f"llama.cpp, {name}": distance(base, arm) for name, arm in arms.items()}
        distances = {"llama.cpp, tierrun": distance(base, ours), **own}
        if llama_quantize is not None:
            expanded = expanded_logits(gguf, ids, llama_quantize)
            distances["llama.cpp, the same in F32"] = distance(base, expanded)
            distances["llama.cpp in F32, tierrun"] = distance(expanded, ours)
        console.print(_table(f"{gguf.name}, {tokens} positions", distances))
        spread = max(each.mean for each in own.values())
        results[gguf.name] = {
            "distances": {name: each._asdict() for name, each in distances.items()},
            "ratio_to_its_own_spread": distances["llama.cpp, tierrun"].mean / spread,
        }
    verdicts: dict[str, Any] = document("llama_parity", {"tokens": tokens, "files": results})
    emit(verdicts, json_file)


if __name__ == "__main__":
    run_script(main)
