"""The files beside a GGUF's weights: configuration, tokenizer, chat template, generation."""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.files import TOKENIZER_FILES, model_files
from tierrun.tools.sources.gguf_config import hf_config
from tierrun.tools.sources.gguf_ends import end_tokens
from tierrun.tools.sources.gguf_tokenizer import TokenizerError, Vocabulary, tokenizer_json

log = logging.getLogger(__name__)

_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""`general.sampling.*` → what transformers calls it."""

_TEMPLATE_NAME = re.compile(r"^[\w-]{1,64}$")


def write_model_files(
    path: Path,
    metadata: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_freqs: Sequence[float] | None,
    directory: Path,
    config: Path | None,
    tokenizer: Path | None,
) -> None:
    """Write the files of the GGUF at `path` into `directory`, in Hugging Face's form.

    The same metadata gives the same bytes. `rope_freqs` is as `hf_config` takes it; `config` and
    `tokenizer` are directories to take those from instead.

    Raises:
        CheckpointError: an architecture or a tokenizer that cannot be rebuilt.
    """
    if config is not None:
        _copy(config, directory, "config.json")
    else:
        _write_json(directory / "config.json", _config(path, metadata, shapes, rope_freqs))
    if tokenizer is not None:
        for file in TOKENIZER_FILES:
            (directory / file).unlink(missing_ok=True)
        _copy(tokenizer, directory, *TOKENIZER_FILES)
    elif not any((directory / file).is_file() for file in TOKENIZER_FILES):
        _rebuild_tokenizer(path, metadata, directory)
    if not (directory / "generation_config.json").is_file():
        _write_json(directory / "generation_config.json", _generation(metadata))


def _config(
    path: Path,
    metadata: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_freqs: Sequence[float] | None,
) -> dict[str, Any]:
    try:
        return hf_config(metadata, shapes, rope_freqs)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _copy(source: Path, directory: Path, *wanted: str) -> None:
    """The model files of `source`, of which it must have one of those `wanted`."""
    if not any((source / file).is_file() for file in wanted):
        raise CheckpointError(f"{source} has no {' or '.join(wanted[:2])}; name another directory")
    for file in model_files(source):
        if wanted == ("config.json",) or file.name not in ("config.json", _GENERATION):
            copy = directory / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


_GENERATION = "generation_config.json"


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _rebuild_tokenizer(path: Path, metadata: dict[str, Any], directory: Path) -> None:
    try:
        vocabulary = Vocabulary.of(metadata)
        if vocabulary is None:
            log.warning(
                "%s has no tokenizer, so the store gets none; --tokenizer names one", path.name
            )
            return
        text = tokenizer_json(vocabulary)
    except TokenizerError as reason:
        raise CheckpointError(
            f"{path}: the tokenizer cannot be rebuilt: {reason}; name the original's directory or "
            "hub id with --tokenizer"
        ) from None
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{role}_token": vocabulary.special(name) for role, name in roles.items()}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(directory / "tokenizer_config.json", about | special)
    _write_templates(metadata, directory)


def _write_templates(metadata: dict[str, Any], directory: Path) -> None:
    key = "tokenizer.chat_template"
    for name, template in metadata.items():
        if not name.startswith(key) or not isinstance(template, str):
            continue
        if name == key:
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        elif _TEMPLATE_NAME.match(name.removeprefix(key + ".")):
            more = directory / "additional_chat_templates"
            more.mkdir(exist_ok=True)
            (more / f"{name.removeprefix(key + '.')}.jinja").write_text(template, encoding="utf-8")


def _generation(metadata: dict[str, Any]) -> dict[str, Any]:
    """What ends an answer, and the sampling that the model's makers recommend."""
    sampling = {
        name: metadata[f"general.sampling.{key}"]
        for key, name in _SAMPLING.items()
        if isinstance(metadata.get(f"general.sampling.{key}"), int | float)
    }
    document: dict[str, Any] = dict(sampling)
    if sampling:
        document["do_sample"] = sampling.get("temperature") != 0
    return document | end_tokens(metadata)
