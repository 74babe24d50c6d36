"""From what the user names as the source to the checkpoint, opened."""

from pathlib import Path

from tierrun.io.errors import UsageError
from tierrun.tools.sources.checkpoint import ModelSource
from tierrun.tools.sources.gguf import GgufCheckpoint
from tierrun.tools.sources.hub import locate, locate_model_files
from tierrun.tools.sources.quantised import open_checkpoint


def open_source(
    source: Path | str,
    *,
    config: Path | str | None = None,
    tokenizer: Path | str | None = None,
    requant: bool = False,
) -> ModelSource:
    """The checkpoint `source`: a directory, a .gguf file, a hub id, or one with `:quantisation`.

    `config` and `tokenizer` (directories or hub ids) stand in for what a GGUF says; `requant`
    accepts tensors whose type has no codec.

    Raises:
        CheckpointError, CorruptError: the checkpoint cannot be read.
        UsageError: `config` or `tokenizer` for a checkpoint that has its own.
    """
    located = locate(source)
    if not located.files:
        if config is not None or tokenizer is not None:
            raise UsageError(
                f"--config and --tokenizer are for GGUF files; {source} has its own beside it"
            )
        return open_checkpoint(located.directory, located.name)
    return GgufCheckpoint.open(
        located.files,
        config=None if config is None else locate_model_files(config),
        tokenizer=None if tokenizer is None else locate_model_files(tokenizer),
        requant=requant,
    )
