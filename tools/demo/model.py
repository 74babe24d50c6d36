"""The demo model: a Qwen3-MoE of 14 million parameters, and the way it computes in training.

Its experts are so small that a GPU trains fastest when it computes all of them for every token,
as two plain matrix products, and gives the experts that the router left out a weight of zero.
That is the same function as transformers' own sparse forward, which the saved model uses.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

DENSE = "tierrun_demo_dense"
LARGEST_SHARD = "12MB"

ExpertsForward: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def demo_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3MoeConfig:
    """Every layer sparse; one expert is 120 KiB in bf16, a whole number of 4 KiB pages."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=80,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=tokenizer.model_max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def new_model(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Qwen3MoeForCausalLM:
    """An untrained model whose experts compute densely."""
    ALL_EXPERTS_FUNCTIONS.register(DENSE, dense_experts(compiled=device.type == "cuda"))
    model = Qwen3MoeForCausalLM(demo_config(tokenizer))
    model.set_experts_implementation(DENSE)
    return _moved(model, device)


def dense_experts(compiled: bool) -> ExpertsForward:
    gated = torch.compile(_gated) if compiled else _gated

    def forward(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate_up_proj = experts.get_parameter("gate_up_proj")
        down_proj = experts.get_parameter("down_proj")
        num_experts = gate_up_proj.shape[0]
        share = weights.new_zeros(len(hidden), num_experts).scatter(1, chosen, weights)
        inner = gated(F.linear(hidden, gate_up_proj.flatten(0, 1)), share)
        return F.linear(inner, down_proj.permute(1, 0, 2).flatten(1))

    return forward


def _gated(gate_up: Tensor, share: Tensor) -> Tensor:
    gate, up = gate_up.view(*share.shape, 2, -1).unbind(2)
    inner: Tensor = F.silu(gate) * up * share.unsqueeze(-1)
    return inner.flatten(1)


def _moved(model: Qwen3MoeForCausalLM, where: torch.device | torch.dtype) -> Qwen3MoeForCausalLM:
    module: nn.Module = model
    module.to(where)
    return model


def add_dropout(model: Qwen3MoeForCausalLM, rate: float) -> None:
    """Drops parts of the embeddings and of what each block adds to the residual stream."""

    def drop(module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "self_attn.o_proj", "mlp.experts")):
            module.register_forward_hook(drop)


def save(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Path, out: Path
) -> None:
    """The model in bf16, its tokenizer, how to sample from it, and its data's licence."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )
    _moved(model, torch.bfloat16).save_pretrained(out, max_shard_size=LARGEST_SHARD)
    tokenizer.save_pretrained(out)
    shutil.copyfile(corpus / "LICENSE-PSF.txt", out / "LICENSE-PSF.txt")


def load(
    checkpoint: Path, device: torch.device
) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerBase]:
    """What a user gets: the saved model with transformers' own forward."""
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    return _moved(model, device).train(False), AutoTokenizer.from_pretrained(checkpoint)
