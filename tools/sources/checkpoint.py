"""What conversion asks of a checkpoint, whatever kind of files it is in."""

from pathlib import Path
from typing import Protocol, Self

from transformers import PreTrainedModel

from tierrun.tools.mapping import Mapping
from tierrun.tools.sources.source import Source


class ModelSource(Source, Protocol):
    """An opened checkpoint: its tensors, and the files that go into the store with them.

    `directory` holds config.json, tokenizer and chat template in Hugging Face's form; `with`
    closes the checkpoint.
    """

    @property
    def directory(self) -> Path: ...

    @property
    def model_id(self) -> str:
        """What the model is called in the store."""
        ...

    def mapping(self, model: PreTrainedModel) -> Mapping:
        """Which tensors become which parameters of `model` (on the meta device)."""
        ...

    def fingerprint(self) -> str:
        """A hash that differs for different checkpoints without reading them whole."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
