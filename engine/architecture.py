"""An architecture from transformers, built on the meta device: shapes and names, no bytes.

Conversion asks it which tensors a checkpoint must become; loading fills it from the store.
"""

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tierrun.io.errors import CheckpointError, ModelError

log = logging.getLogger(__name__)

EXPERT_MATRICES = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of an experts module that hold one matrix per expert, in record order; each may have
a bias `<name>_bias`."""

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers' `use_experts_implementation` leaves on every experts module that it routes."""

_CANNOT_CONTINUE = {"jamba"}
"""Model types whose recurrent layers, as transformers 5.23 writes them, start from nothing when
they get several tokens at once, whatever their cache holds; one at a time they go on correctly."""

_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "num_experts_per_topk",
    "top_k",
)


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration in `directory/config.json`, of its text model where it is composite.

    Raises:
        CheckpointError: no config.json, or one that is not JSON.
        ModelError: a `model_type` that transformers does not know.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; is it a Hugging Face checkpoint?")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{directory}: transformers cannot build this model: {first}") from None
    except Exception as error:  # a file that cannot be read, or numbers of the wrong type
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{directory}/config.json cannot be used: {first}") from error
    return _causal_config(config, directory)


def _causal_config(config: PreTrainedConfig, directory: Path) -> PreTrainedConfig:
    """`config` itself, or its text part where the whole would build towers that are not text."""
    text = config.get_text_config()
    if text is not config and type(text) in AutoModelForCausalLM._model_mapping:
        log.warning("%s is composite: the text model is used, the rest is dropped", directory)
        return text
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"{directory}: {config.model_type} has no causal language model in transformers"
        )
    return config


def build_meta(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **attributes: Any
) -> PreTrainedModel:
    """The causal language model of `config` on the meta device, in `dtype`, in eval mode.

    Raises:
        ModelError: transformers refuses the configuration.
    """
    try:
        with torch.device("meta"):
            build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
            model: Any = build(config, dtype=dtype, **attributes)
    except Exception as error:  # whatever an architecture's constructor raises on odd numbers
        raise ModelError(f"transformers cannot build {config.model_type}: {error}") from error
    built: PreTrainedModel = model.eval()
    return built


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every experts module that transformers routes through `ExpertsInterface`, by its path.

    Raises:
        CheckpointError: a dense model.
        ModelError: a Mixture of Experts that transformers does not route (llama4, dbrx, …).
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if all(mark in vars(module) for mark in _MARKS)
    }
    if found:
        return found
    kind = model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__
    if any("expert" in path.rsplit(".", 1)[-1].lower() for path, _ in model.named_modules()):
        raise ModelError(
            f"{kind} routes its experts in its own way, not through transformers' "
            "ExpertsInterface; tierrun cannot stream it yet"
        )
    raise CheckpointError(f"{kind} is a dense model: it has no routed experts to stream")


def expert_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """The per-expert parameters of an experts module ([num_experts, …] each), in record order."""
    parameters = dict(module.named_parameters(recurse=False))
    names = [*EXPERT_MATRICES, *(f"{name}_bias" for name in EXPERT_MATRICES)]
    return {name: parameters[name] for name in names if name in parameters}


def continues(model: PreTrainedModel) -> bool:
    """Whether several tokens at once may follow a context that is not empty."""
    return model.config.get_text_config().model_type not in _CANNOT_CONTINUE


def keeps_few_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward can be told to compute the last logits only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def top_k(model: PreTrainedModel, path: str) -> int:
    """Experts used per token by the experts module at `path`.

    Looked up on the enclosing block, its router, and the configuration, under the names that
    transformers' architectures use.
    """
    parent = model.get_submodule(path.rpartition(".")[0])
    for owner in (parent, *parent.children(), model.config.get_text_config()):
        for name in _TOP_K_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise ModelError(
        f"{model.config.model_type}: cannot tell how many experts {path} uses per token"
    )
