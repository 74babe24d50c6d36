"""The logits that llama.cpp gives, as a process of its own (bench.llama_parity starts it).

    python -m tierrun.bench.llama_logits GGUF IDS.npy OUT.npy

needs the package `llama-cpp-python`; LLAMA_CPP_LIB_PATH chooses another build of its libraries.
"""

import ctypes
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tierrun.bench.report import run_script
from tierrun.io.errors import TierrunError

_F16, _F32 = 1, 0


def main(
    gguf: Path,
    ids: Path,
    out: Path,
    threads: Annotated[int, typer.Option(help="Of both kinds.")] = 1,
    ubatch: Annotated[int, typer.Option(help="Tokens computed at once.")] = 512,
    f16_cache: Annotated[
        bool, typer.Option(help="llama.cpp's default for keys and values.")
    ] = False,
    repack: Annotated[bool, typer.Option(help="Let it rearrange weights for its kernels.")] = True,
) -> None:
    """Write the logits after each of the tokens, fp32 [tokens, vocabulary]."""
    api: Any = import_module("llama_cpp")
    tokens = np.load(ids).astype(np.int32)
    model_parameters = api.llama_model_default_params()
    model_parameters.use_extra_bufts = repack
    model_parameters.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(gguf).encode(), model_parameters)
    if not model:
        raise TierrunError(f"llama.cpp cannot load {gguf}")
    parameters = api.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = len(tokens)
    parameters.n_ubatch = ubatch
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.type_k = parameters.type_v = _F16 if f16_cache else _F32
    if not f16_cache:
        parameters.flash_attn_type = 0
    context = api.llama_init_from_model(model, parameters)
    batch = api.llama_batch_init(len(tokens), 0, 1)
    for position, token in enumerate(tokens):
        batch.token[position], batch.pos[position] = int(token), position
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.logits[position] = 1
    batch.n_tokens = len(tokens)
    if api.llama_decode(context, batch) != 0:
        raise TierrunError(f"llama.cpp cannot run {gguf}")
    size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    pointer = ctypes.cast(api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    np.save(out, np.ctypeslib.as_array(pointer, (len(tokens), size)))


if __name__ == "__main__":
    run_script(main)
