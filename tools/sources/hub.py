"""Where a source lies: on this machine, or on the Hugging Face hub to be fetched."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.gguf_files import only_model, pieces

_MODEL_ID = re.compile(r"^(?P<repository>[\w.-]+/[\w.-]+)(:(?P<quantisation>[\w.-]+))?$")
_MODEL_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
_UNWANTED = ["original/*", "metal/*", "onnx/*", "consolidated*"]
"""The same weights once more, in other programs' formats."""


class Source(NamedTuple):
    """A checkpoint's directory, the name that it goes by, and its files if they are GGUF."""

    directory: Path
    name: str
    files: tuple[Path, ...] = ()


def locate(source: str | Path) -> Source:
    """Where `source` lies; a hub id is downloaded (or found in the local hub cache).

    A hub id with `:quantisation` is a repository of GGUF files, of which those are fetched.

    Raises:
        CheckpointError: neither here nor a model that can be fetched; several models; or a piece
            of a split one missing.
    """
    path = Path(source)
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        return Source(path.parent, path.stem, pieces(path))
    match = _model_id(source, "directory or file")
    repository, quantisation = match["repository"], match["quantisation"]
    if quantisation is not None:
        files = _download_gguf(repository, quantisation)
        return Source(files[0].parent, repository, files)
    directory = _download(repository, ["*.safetensors", *_MODEL_FILES], _UNWANTED)
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{repository} has no *.safetensors files; if it has GGUF files, say which: "
            f"{repository}:Q4_K_M"
        )
    return Source(directory, repository)


def locate_model_files(source: str | Path) -> Path:
    """The directory of configuration and tokenizer of `source`, a directory or a hub id.

    Raises:
        CheckpointError: neither a directory nor a model that can be fetched.
    """
    if Path(source).is_dir():
        return Path(source)
    return _download(_model_id(source, "directory")["repository"], _MODEL_FILES, _UNWANTED)


def _in_directory(path: Path) -> Source:
    found = list(path.glob("*.gguf"))
    if not found or any(path.glob("*.safetensors")):
        return Source(path, path.resolve().name)
    return Source(path, path.resolve().name, only_model(str(path), found))


def _model_id(source: str | Path, kind: str) -> re.Match[str]:
    match = _MODEL_ID.match(str(source))
    if match is None or str(source).startswith(".") or str(source).endswith(".gguf"):
        raise CheckpointError(f"{source}: no such {kind}")
    return match


def _download_gguf(repository: str, quantisation: str) -> tuple[Path, ...]:
    """The files of one quantisation, in whatever case and folder the repository has them."""
    spelt = {quantisation, quantisation.upper(), quantisation.lower()}
    wanted = sorted(f"*{text}*.gguf" for text in spelt)
    unwanted = ["*mmproj*", "*imatrix*"]
    if "ud-" not in quantisation.lower():
        unwanted.append("*UD-*")  # the same quantisation, otherwise spread over the tensors
    directory = _download(repository, wanted, unwanted)
    paths = [
        path
        for path in directory.rglob("*.gguf")
        if _matches(path.relative_to(directory), wanted)
        and not _matches(path.relative_to(directory), unwanted)
    ]
    return only_model(f"{repository}:{quantisation}", paths)


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(str(path), pattern) for pattern in patterns)


def _download(model_id: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # imports an HTTP client: only when needed

    try:
        found = snapshot_download(
            model_id, allow_patterns=list(wanted), ignore_patterns=list(unwanted)
        )
    except Exception as error:  # HTTP, DNS, proxy and authorisation errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model_id}: no such directory, and the hub did not give it: {reason}"
        ) from error
    return Path(found)
