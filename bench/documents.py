"""Results in files: written for later, read to be compared; what cannot be read is explained."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierrun.bench.cells import Results
from tierrun.bench.report import SCHEMA
from tierrun.io.errors import UsageError


@dataclass(frozen=True, slots=True)
class Saved:
    """Results, and where, with what code and by which command they were made.

    `name` is what to call them: the file, or `this run`.
    """

    name: str
    results: Results
    machine: Mapping[str, Any]
    tierrun: str
    commit: str

    @staticmethod
    def of(name: str, document: Mapping[str, Any]) -> "Saved":
        """Raises KeyError, TypeError, ValueError or AttributeError: not such a document."""
        return Saved(
            name,
            Results.from_json(document),
            dict(document["machine"]),
            str(document["tierrun"]),
            str(document["commit"]),
        )


def read_document(path: Path) -> Saved:
    """The results in `path`.

    Raises:
        UsageError: not there, or not what this tierrun can read; says why and what to do.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or "benchmark" not in document:
        raise UsageError(f"{path} holds no results of a benchmark: write them with --json FILE")
    _check_schema(path, document)
    try:
        return Saved.of(str(path), document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: damaged results ({error!r}){_again(document)}") from None


def _check_schema(path: Path, document: Mapping[str, Any]) -> None:
    schema, by = document.get("schema"), document.get("tierrun", "an unknown version")
    if schema == SCHEMA:
        if "cells" not in document:
            raise UsageError(
                f"{path} has no cells to compare: it was written by a script of its own form, "
                f"tierrun.bench.{document['benchmark']}; compare those by eye"
            )
        return
    if schema is None:
        raise UsageError(
            f"{path} was written before results had a schema (commit "
            f"{document.get('commit', 'unknown')}), with no samples to compare{_again(document)}"
        )
    newer = isinstance(schema, int) and schema > SCHEMA
    remedy = "; update tierrun to compare them" if newer else _again(document)
    raise UsageError(
        f"{path} has results of schema {schema!r}, written by tierrun {by}; this is tierrun with "
        f"schema {SCHEMA}, which does not know their form{remedy}"
    )


def _again(document: Mapping[str, Any]) -> str:
    command = document.get("command")
    return f"; make them again: {command}" if command else ""
