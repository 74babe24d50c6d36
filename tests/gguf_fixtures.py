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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import quiet, tiny_model
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


@dataclass(frozen=True, slots=True)
class Fixture:
    """A model family as a GGUF: the pre-tokenizer's name, numbers for its config, and options.

    `mtp` adds a multi-token-prediction layer to the checkpoint, under this prefix.
    """

    family: str
    pre: str
    config: dict[str, Any]
    options: tuple[str, ...] = ()
    mtp: str | None = None


def _experts(count: int) -> dict[str, Any]:
    """As many experts, under every name that a configuration may have for it."""
    return dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), count)


_SMALL: dict[str, Any] = _experts(5) | {
    "num_experts_per_tok": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 640,
}

_ROPE: dict[str, Any] = {"rope_theta": 4321.0, "rope_type": "default"}

_PARTIAL: dict[str, Any] = _ROPE | {"partial_rotary_factor": 0.5}

_LINEAR: dict[str, Any] = _experts(4) | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 3,
    "shared_expert_intermediate_size": 40,
    "head_dim": 24,
    "rope_parameters": _PARTIAL,
    "rms_norm_eps": 2e-5,
}

_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 4321.0,
    "factor": 4.0,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
    "original_max_position_embeddings": 64,
}

_LATENT: dict[str, Any] = _experts(6) | {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.75,
    "rms_norm_eps": 2e-5,
}

MODELS: dict[str, Fixture] = {
    "mixtral": Fixture(
        "mixtral", "llama-bpe", {"rope_parameters": _ROPE, "rms_norm_eps": 2e-5, "head_dim": 24}
    ),
    "olmoe": Fixture(  # the converter writes an epsilon of its own
        "olmoe", "olmo", {"rope_parameters": _ROPE}, ("--split-max-tensors", "14")
    ),
    "qwen2moe": Fixture(
        "qwen2_moe",
        "qwen2",
        {
            "rope_parameters": _ROPE,
            "rms_norm_eps": 2e-5,
            "shared_expert_intermediate_size": 64,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3moe": Fixture(
        "qwen3_moe",
        "qwen2",
        {
            "rope_parameters": {
                key: value for key, value in _YARN.items() if not key.startswith("beta")
            },
            "rms_norm_eps": 2e-5,
            "head_dim": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3next": Fixture("qwen3_next", "qwen2", _LINEAR, ("--no-mtp", "--fuse-gate-up-exps")),
    "qwen35moe": Fixture(
        "qwen3_5_moe_text",
        "qwen35",
        _LINEAR | _experts(3) | {"num_experts_per_tok": 2},
        mtp="mtp.layers.0.",
    ),
    "deepseek_v2": Fixture(
        "deepseek_v2",
        "deepseek-llm",
        _LATENT
        | {
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": Fixture(
        "deepseek_v3",
        "deepseek-v3",
        _LATENT | {"rope_parameters": _ROPE, "scoring_func": "sigmoid"},
    ),
    "glm4moe": Fixture(
        "glm4_moe",
        "glm4",
        _experts(4)
        | {
            "rope_parameters": _ROPE | {"partial_rotary_factor": 0.25},
            "rms_norm_eps": 2e-5,
            "head_dim": 24,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.75,
        },
        mtp="model.layers.2.",
    ),
    "gpt-oss": Fixture(
        "gpt_oss",
        "gpt-4o",
        {
            "sliding_window": 8,
            "head_dim": 24,
            "rope_parameters": _YARN | {"truncate": False},
            "rms_norm_eps": 2e-5,
        },
    ),
    "minimax-m2": Fixture(
        "minimax_m2",
        "minimax-m2",
        {
            "rope_parameters": _PARTIAL,
            "head_dim": 24,
            "rotary_dim": 12,
            "scoring_func": "sigmoid",
            "rms_norm_eps": 2e-5,
        },
    ),
    "gemma4": Fixture(
        "gemma4_text",
        "gemma4",
        {
            "top_k_experts": 3,
            "rms_norm_eps": 2e-5,
            "sliding_window": 8,
            "final_logit_softcapping": 20.0,
            "attention_k_eq_v": True,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 4321.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 54321.0,
                },
            },
            "tie_word_embeddings": True,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
    ),
}
"""Name (of the architecture in llama.cpp, unless two share one) → how it is made."""

_TINY: dict[str, Any] = _experts(4) | {
    "hidden_size": 32,
    "num_experts_per_tok": 2,
    "rope_parameters": _ROPE,
}

OTHERS: dict[str, Fixture] = {
    "afmoe": Fixture("afmoe", "qwen2", _TINY),
    "dots1": Fixture("dots1", "qwen2", _TINY),
    "exaone-moe": Fixture("exaone_moe", "qwen2", _TINY),
    "granitemoe": Fixture("granitemoe", "qwen2", _TINY | {"attention_multiplier": 0.2}),
    "lfm2moe": Fixture("lfm2_moe", "qwen2", _TINY),
}
"""Those whose configuration must be given."""


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
    numbers = _known(fixture.family, _SMALL | fixture.config)
    unknown = _experts(0).keys() - numbers.keys()
    own = {name: value for name, value in fixture.config.items() if name not in unknown}
    model = tiny_model(fixture.family, **config | numbers | own)
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
