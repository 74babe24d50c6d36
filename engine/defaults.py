"""What a model says about how it wants to be run: sampling, end of sequence, context."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tierrun.engine.sampling import Sampling, sampling_from
from tierrun.io.errors import StoreError, UsageError

_UNBOUNDED = 1 << 20
"""The context of a model that names no longest one (state-space models)."""


_GPU_CONTEXT = 8192
"""The context on a GPU where none was asked for."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise StoreError(f"{path} is not JSON ({error}); convert the model again") from None
    return document if isinstance(document, dict) else {}


class ModelDefaults:
    """The defaults in a store's configuration files; generation_config.json comes first."""

    def __init__(
        self,
        model_dir: Path,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self._config, self._tokenizer = config.get_text_config(), tokenizer
        path = model_dir / "generation_config.json"
        self._generation = _read_json(path) if path.is_file() else {}

    def sampling(self, **given: Any) -> Sampling:
        """The model's own sampling, overridden by what is `given` (None: not given)."""
        return sampling_from(self._generation, **given)

    def eos_tokens(self) -> frozenset[int]:
        """The tokens that end an answer."""
        for source in (
            self._generation.get("eos_token_id"),
            getattr(self._config, "eos_token_id", None),
            self._tokenizer.eos_token_id if self._tokenizer else None,
        ):
            if source is not None:
                return frozenset(source if isinstance(source, list) else [source])
        return frozenset()

    def context(self, asked: int, *, on_gpu: bool = False) -> int:
        """Tokens of context: `asked`, or for 0 the model's longest.

        On a GPU, where a longer one takes memory from the experts, 0 is no more than 8192.

        Raises:
            UsageError: longer than the model's.
        """
        longest = getattr(self._config, "max_position_embeddings", None)
        if longest is None:
            return asked or (_GPU_CONTEXT if on_gpu else _UNBOUNDED)
        if asked > longest:
            raise UsageError(f"-c/--ctx-size {asked}: this model's context ends at {longest}")
        return asked or min(int(longest), _GPU_CONTEXT if on_gpu else int(longest))
