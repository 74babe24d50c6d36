"""Where a source lies: in a local directory, or on the Hugging Face hub to be fetched."""

import re
from pathlib import Path
from typing import NamedTuple

from tierrun.io.errors import CheckpointError

_MODEL_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_WANTED = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
_UNWANTED = ["original/*", "metal/*", "onnx/*", "consolidated*"]
"""The same weights once more, in other programs' formats."""


class Source(NamedTuple):
    """A checkpoint's directory and the name that it goes by."""

    directory: Path
    name: str


def locate(source: str | Path) -> Source:
    """The directory of `source`; a hub id is downloaded (or found in the local hub cache).

    Raises:
        CheckpointError: neither a directory nor a model that can be fetched.
    """
    path = Path(source)
    if path.is_dir():
        return Source(path, path.resolve().name)
    if not _MODEL_ID.match(str(source)) or str(source).startswith("."):
        raise CheckpointError(f"{source}: no such directory")
    return Source(_download(str(source)), str(source))


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download  # imports an HTTP client: only when needed

    try:
        return Path(snapshot_download(model_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # HTTP, DNS, proxy and authorisation errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model_id}: no such directory, and the hub did not give it: {reason}"
        ) from error
