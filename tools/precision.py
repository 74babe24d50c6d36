"""In which dtype each weight is stored: the source's, or the one asked for where that may be."""

import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tierrun.engine.architecture import build_meta
from tierrun.io.errors import UsageError

_NAMES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "f16": torch.float16, "fp16": torch.float16, "float16": torch.float16,
    "f32": torch.float32, "fp32": torch.float32, "float32": torch.float32,
}  # fmt: skip


def parse_dtype(name: str | None) -> torch.dtype | None:
    """`bf16`, `f16` or `f32` (or torch's names for them); None stays None.

    Raises:
        UsageError: any other name.
    """
    if name is None:
        return None
    if name not in _NAMES:
        raise UsageError(f"--dtype {name}: choose bf16, f16 or f32")
    return _NAMES[name]


@dataclass(frozen=True, slots=True)
class Precision:
    """What `--dtype` does to each weight. `fp32` are the weights that the model keeps in fp32."""

    asked: torch.dtype | None
    fp32: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel, asked: torch.dtype | None) -> "Precision":
        """For `model`, exactly as transformers would cast it on `from_pretrained(dtype=asked)`."""
        if asked is None:
            return cls(None, frozenset())
        patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(asked)]
        created = build_meta(model.config, dtype=asked).state_dict()
        kept = {
            name
            for name, tensor in created.items()
            if tensor.dtype == torch.float32 or any(re.search(p, name) for p in patterns)
        }
        return cls(asked, frozenset(kept))

    def stored(self, name: str, source: torch.dtype) -> torch.dtype:
        """The dtype in which parameter `name` is stored when its source has `source`."""
        if self.asked is None or not source.is_floating_point:
            return source
        if name in self.fp32 and source == torch.float32:
            return source
        return self.asked
