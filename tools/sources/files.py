"""Which files make up a checkpoint, and whether they are all there."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tierrun.io.errors import CheckpointError

_NUMBERED = re.compile(r"^(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors$")

_MODEL_FILES = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja",
    "*.model", "*.tiktoken", "merges.txt", "vocab.txt",
)  # fmt: skip

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
"""Of which a directory with a tokenizer has one."""


def model_files(directory: Path) -> Iterator[Path]:
    """Configuration, tokenizer and chat template in `directory`."""
    for pattern in _MODEL_FILES:
        for path in sorted(directory.glob(pattern)):
            if not path.name.endswith(".index.json"):
                yield path


def read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; is it a Hugging Face checkpoint?"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return document


def weight_files(directory: Path) -> list[Path]:
    """The weight files as transformers chooses them: one file, an index, or what is there."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        return [_existing(directory / name, f"named in {index.name}") for name in names]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise CheckpointError(_no_weights(directory))
    for path in found:
        _check_siblings(path)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it")
    return weight_map


def _existing(path: Path, why: str) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing ({why}); download the checkpoint again")
    return path


def _check_siblings(path: Path) -> None:
    match = _NUMBERED.match(path.name)
    for number in range(1, int(match["count"]) + 1 if match else 0):
        assert match is not None
        sibling = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
        _existing(path.parent / sibling, f"a sibling of {path.name}")


def _no_weights(directory: Path) -> str:
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if any(directory.glob(pattern)):
            return (
                f"{directory} has only {pattern} weights, which can run code when opened; load it "
                "with transformers and save_pretrained() it as safetensors first"
            )
    return f"{directory} has no *.safetensors files; is the download complete?"


def check_index(directory: Path, tensors: Iterable[str]) -> None:
    """Every tensor that the index promises must be in a file (a stale shard has others)."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file() or (directory / "model.safetensors").is_file():
        return
    present = set(tensors)
    for name, file in _weight_map(index).items():
        if name not in present:
            raise CheckpointError(
                f"tensor {name} is missing: {index.name} says it is in {file}; download it again"
            )
