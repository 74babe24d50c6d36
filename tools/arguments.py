"""Command-line arguments that several commands share, and how a bare `tierrun …` is read.

Flags have the names that llama.cpp's users expect. `tierrun --nvme-dir DIR -p text` is
`tierrun run …`, and options may stand before the command.
"""

import os
import sys
from collections.abc import Collection, Mapping, Sequence
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
        help="Directory of the store. Repeat it for shards on several drives; "
        "the first holds the manifest. [env var: TIERRUN_NVME_DIR]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more, on stderr.")]


def named_directories(argument: list[Path] | None, option: list[Path] | None) -> list[Path]:
    """The directories named either way, or in the environment (separated by `:`), or none.

    Raises:
        UsageError: named both ways.
    """
    if argument and option:
        raise UsageError("name the store once: as an argument or with --nvme-dir")
    inherited = os.environ.get("TIERRUN_NVME_DIR", "")
    return argument or option or [Path(part) for part in inherited.split(os.pathsep) if part]


def store_directories(argument: list[Path] | None, option: list[Path] | None) -> list[Path]:
    """The directories of a store; see `named_directories`.

    Raises:
        UsageError: named both ways, or not at all.
    """
    named = named_directories(argument, option)
    if not named:
        raise UsageError("no store: name its directory, or give --nvme-dir DIR")
    return named


def normalise(
    argv: Sequence[str], commands: Mapping[str, Collection[str]], value_options: Collection[str]
) -> list[str]:
    """Put the command first; a line that names none is a `run`.

    `commands` may have commands of their own, which come second. `value_options` are those that
    take the next word, so that `-p run` is a prompt.
    """
    words = iter(range(len(argv)))
    for i in words:
        if argv[i] in commands:
            end = i + 2 if argv[i + 1 : i + 2] and argv[i + 1] in commands[argv[i]] else i + 1
            return [*argv[i:end], *argv[:i], *argv[end:]]
        if argv[i] in value_options:
            next(words, None)
    asks = not argv or argv[0] in ("-h", "--help", "--version")
    return list(argv) if asks else ["run", *argv]


def read_prompt(
    prompt: str | None, file: Path | None, token_ids: str | None
) -> str | list[int] | None:
    """What to continue: `-p`, `-f`, `--token-ids` or a pipe; None for a chat on a terminal.

    Raises:
        UsageError: more than one of them, or one that cannot be read.
    """
    if sum(source is not None for source in (prompt, file, token_ids)) > 1:
        raise UsageError("-p/--prompt, -f/--file and --token-ids exclude each other")
    if token_ids is not None:
        return parse_ids(token_ids, "--token-ids")
    if prompt is not None and prompt != "-":
        return prompt
    if file is None and prompt is None and sys.stdin.isatty():
        return None
    try:
        return (sys.stdin.buffer.read() if file is None else file.read_bytes()).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompt in {file or 'stdin'} cannot be read: {error}") from None


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
