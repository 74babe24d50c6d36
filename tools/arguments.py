"""Command-line arguments that several commands share, and how a bare `tierrun …` is read.

Flags have the names that llama.cpp's users expect. `tierrun --nvme-dir DIR -p text` is
`tierrun run …`, and options may stand before the command.
"""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tierrun.io.errors import UsageError

StoreArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[DIR]...", help="The store; same as --nvme-dir.", show_default=False),
]
NvmeDir = Annotated[
    list[Path] | None,
    typer.Option(
        "--nvme-dir",
        envvar="TIERRUN_NVME_DIR",
        help="Directory of the store. Repeat it for shards on several drives; "
        "the first holds the manifest.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more, on stderr.")]


def store_directories(argument: list[Path] | None, option: list[Path] | None) -> list[Path]:
    """The directories of a store named either way.

    Raises:
        UsageError: not named at all.
    """
    directories = [*(option or []), *(argument or [])]
    if not directories:
        raise UsageError("no store: name its directory, or give --nvme-dir DIR")
    return directories


def normalise(
    argv: Sequence[str], commands: Collection[str], value_options: Collection[str]
) -> list[str]:
    """Put the command first; a line that names none is a `run`.

    `value_options` are those that take the next word, so that `-p run` is a prompt.
    """
    words = iter(range(len(argv)))
    for i in words:
        if argv[i] in commands:
            return [argv[i], *argv[:i], *argv[i + 1 :]]
        if argv[i] in value_options:
            next(words, None)
    asks = not argv or any(word in ("-h", "--help", "--version") for word in argv)
    return list(argv) if asks else ["run", *argv]


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The text to continue: from `-p`, from `-f`, from a pipe; None for a chat on a terminal.

    Raises:
        UsageError: a file that cannot be read, or both.
    """
    if prompt is not None and file is not None:
        raise UsageError("-p/--prompt and -f/--file exclude each other")
    if file is not None:
        try:
            return file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"-f {file}: {error}") from None
    if prompt is not None and prompt != "-":
        return prompt
    if prompt == "-" or not sys.stdin.isatty():
        return sys.stdin.read()
    return None


def parse_ids(text: str, flag: str) -> list[int]:
    """Token ids separated by commas or blanks.

    Raises:
        UsageError: anything else.
    """
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        ids = []
    if not ids or min(ids) < 0:
        raise UsageError(f"{flag}: token ids are numbers separated by commas, like 1,22,333")
    return ids
