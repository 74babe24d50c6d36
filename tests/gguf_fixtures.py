"""Tiny GGUF files as llama.cpp writes them, with the logits that transformers gives the originals.

    python -m tests.gguf_fixtures LLAMA_CPP_DIR [name …]

writes tests/fixtures/gguf/<name>/: the GGUF of `convert_hf_to_gguf.py --outtype f32`, the config
and tokenizer that it was made from, and token ids with their logits. Every weight is random and a
bf16 number (so that git's compression halves the file), every number in a config that changes the
outcome differs from transformers' default. The same checkout of llama.cpp gives the same bytes. Its
converter imports `sentencepiece`, which tierrun does not need: put it on PYTHONPATH.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import quiet, tiny_model
from tests.gguf_models import MODELS, OTHERS, SMALL, Fixture, experts
from tests.gguf_tokenizers import byte_fallback_tokenizer, byte_level_tokenizer
from transformers import AutoConfig, PreTrainedModel

FIXTURES = Path(__file__).parent / "fixtures" / "gguf"
NUM_TOKENS = 40

_COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

_DRIVER = """
import sys
root, pre, *arguments = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py", *arguments]
convert_hf_to_gguf.main()
"""
"""Runs the converter with the pre-tokenizer's name, which it cannot guess of a tiny one."""


def write_fixture(name: str, llama_cpp: Path, directory: Path) -> None:
    """The files of fixture `name`, in `directory`; `llama_cpp` is a checkout of llama.cpp."""
    fixture = (MODELS | OTHERS)[name]
    with TemporaryDirectory() as scratch, quiet():
        checkpoint = Path(scratch) / name
        model = _save_checkpoint(fixture, checkpoint)
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.iterdir():
            old.unlink()
        _run_converter(fixture, llama_cpp, checkpoint, directory / f"{name}.gguf")
        for file in _COPIED:
            (directory / file).write_bytes((checkpoint / file).read_bytes())
    ids = _token_ids(model.config.vocab_size)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    save_file({"ids": ids, "logits": logits.contiguous()}, directory / "reference.safetensors")


def _save_checkpoint(fixture: Fixture, directory: Path) -> PreTrainedModel:
    """A checkpoint with a tokenizer in `directory`; the model."""
    gemma = fixture.family == "gemma4_text"
    tokenizer = byte_fallback_tokenizer() if gemma else byte_level_tokenizer(fixture.pre)
    # a few rows more than tokens, as most have; gemma's converter drops them
    rows = len(tokenizer) + (0 if gemma else 6)
    config = {"num_hidden_layers": 2, "vocab_size": rows, "initializer_range": 0.3}
    numbers = _known(fixture.family, SMALL | fixture.config)
    # other numbers are kept too (published configurations have some that transformers ignores)
    own = {name: value for name, value in fixture.config.items() if name not in experts(0)}
    model = tiny_model(fixture.family, **config | own | numbers)
    _round(model)
    model.save_pretrained(directory, save_original_format=True)
    tokenizer.save_pretrained(directory)
    if fixture.mtp is not None:
        _add_prediction_layer(directory / "model.safetensors", fixture.mtp)
    return model


def _known(family: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """Those of `numbers` that the family's configuration has."""
    default = AutoConfig.for_model(family)
    names = {*default.to_dict(), *default.attribute_map}
    return {name: value for name, value in numbers.items() if name in names}


@torch.no_grad()
def _round(model: PreTrainedModel) -> None:
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())


def _add_prediction_layer(path: Path, prefix: str) -> None:
    """One more layer like the second, and what multi-token prediction has around it."""
    tensors = load_file(path)
    layer = "model.layers.1."
    copied = {
        name.replace(layer, prefix): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(layer)
    }
    norm = tensors["model.norm.weight"]
    joined = torch.cat([norm.diag(), norm.diag()], dim=1)
    if prefix.startswith("mtp."):
        around = {"mtp.fc.weight": joined, "mtp.norm.weight": norm.clone()}
        around |= {f"mtp.pre_fc_norm_{part}.weight": norm.clone() for part in _PARTS}
    else:
        around = {f"{prefix}eh_proj.weight": joined}
        around |= {f"{prefix}{part}.weight": norm.clone() for part in _AROUND}
    save_file(tensors | copied | around, path, metadata={"format": "pt"})


_PARTS = ("embedding", "hidden")
_AROUND = ("enorm", "hnorm", "shared_head.norm")


def _run_converter(fixture: Fixture, llama_cpp: Path, checkpoint: Path, out: Path) -> None:
    arguments = [str(checkpoint), "--outfile", str(out), "--outtype", "f32", *fixture.options]
    command = [sys.executable, "-c", _DRIVER, str(llama_cpp), fixture.pre, *arguments]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def _token_ids(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, rows, (NUM_TOKENS,), generator=generator)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, and so the last bits of the logits, do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(arguments: list[str]) -> None:
    llama_cpp, *names = arguments
    with _one_thread():
        for name in names or MODELS | OTHERS:
            write_fixture(name, Path(llama_cpp).resolve(), FIXTURES / name)
    print(f"wrote {', '.join(names or MODELS | OTHERS)} to {FIXTURES}")


if __name__ == "__main__":
    main(sys.argv[1:])
