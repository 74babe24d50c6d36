"""What is planned for: a store, a checkpoint, a GGUF file, a configuration, or a hub id."""

import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn
from transformers import PreTrainedConfig

from tierrun.engine.architecture import build_meta, read_config
from tierrun.io.errors import CheckpointError
from tierrun.io.store import MANIFEST, Manifest, Store
from tierrun.tiers.usage import Usage, UsageFile
from tierrun.tools.choices import Quantising
from tierrun.tools.convert import plan as plan_conversion
from tierrun.tools.layout import SHARD_BYTES
from tierrun.tools.plan.sketch import sketch
from tierrun.tools.sources.opening import open_source

_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model: `manifest` is its store's, real or as it would be; `kind` says what it is from."""

    name: str
    kind: str
    manifest: Manifest
    config: PreTrainedConfig
    store: Store | None = None
    usage: Usage | None = None

    def looked_up(self) -> Collection[str]:
        """The weights of which a token reads a few rows only: embeddings that no product shares."""
        model = build_meta(self.config)
        shared = set(dict(model.all_tied_weights_keys).values())
        tables = {
            f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)
        }
        return tables - shared


def find(source: str, directories: Sequence[Path] = ()) -> Subject:
    """The model that `source` names; a store may lie in `directories` too.

    Raises:
        CheckpointError: no such thing, or not a Mixture of Experts.
        ModelError: an architecture that cannot be run.
        StoreError: a store that is damaged.
    """
    path = Path(source)
    if (path / MANIFEST).is_file():
        return _store([path, *(other for other in directories if other != path)])
    if path.is_dir() and not any(path.glob("*.safetensors")) and not any(path.glob("*.gguf")):
        return _configuration(path, path.resolve().name)
    if path.is_file() and path.suffix == ".json":
        return _configuration_file(path)
    if path.exists():
        return _checkpoint(path)
    if not _HUB_ID.match(source):
        raise CheckpointError(
            f"{source}: no such file or directory; name a store, a checkpoint, a config.json, a "
            ".gguf file or a hub id"
        )
    return _configuration(_from_hub(source), source)


def _store(directories: Sequence[Path]) -> Subject:
    store = Store.open(directories)
    manifest = store.manifest
    usage = UsageFile(store.roots[0], manifest).read()
    config = read_config(store.model_dir)
    return Subject(str(directories[0]), "store", manifest, config, store, usage)


def _checkpoint(path: Path) -> Subject:
    with open_source(path) as source:
        blueprint, layout = plan_conversion(source, 1, None, SHARD_BYTES, Quantising())
        config = read_config(source.directory)
    kind = "GGUF" if path.suffix == ".gguf" else "checkpoint"
    return Subject(str(path), kind, layout.manifest, config)


def _configuration(directory: Path, name: str) -> Subject:
    config = read_config(directory)
    return Subject(name, "configuration", sketch(config, name), config)


def _configuration_file(path: Path) -> Subject:
    """transformers wants it in a directory of its own, under its own name."""
    with TemporaryDirectory(prefix="tierrun-plan-") as directory:
        shutil.copyfile(path, Path(directory) / "config.json")
        try:
            return _configuration(Path(directory), str(path))
        except CheckpointError as error:
            raise CheckpointError(
                str(error).replace(f"{directory}/config.json", str(path))
            ) from None


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download  # imports an HTTP client: only when needed

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # HTTP, DNS, proxy and authorisation errors share no base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{name}: no such file or directory, and the hub did not give its config.json: "
            f"{lines[0]}"
        ) from None
