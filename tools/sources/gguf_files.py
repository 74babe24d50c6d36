"""Which GGUF files make up a model: one, or all the pieces of a split one."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.gguf_header import GgufHeader

_SPLIT = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_BESIDE = ("mmproj", "imatrix")
"""What lies beside a model in files of the same kind: vision towers, calibration data."""


def model_stem(path: Path) -> str:
    """The name of the model whose file, or piece, `path` is."""
    match = _SPLIT.match(path.name)
    return match["stem"] if match else path.name.removesuffix(".gguf")


def pieces(path: Path) -> tuple[Path, ...]:
    """All the files of the model that `path` is one of, in order.

    Raises:
        CheckpointError: a piece is missing (named).
    """
    match = _SPLIT.match(path.name)
    if match is None:
        return (path,)
    stem, count = match["stem"], match["count"]
    if not 0 < int(match["number"]) <= int(count):
        raise CheckpointError(f"{path} is named as no piece of {int(count)}; rename it")
    names = (f"{stem}-{number + 1:05d}-of-{count}.gguf" for number in range(int(count)))
    found = tuple(path.parent / name for name in names)
    for piece in found:
        if not piece.is_file():
            raise CheckpointError(f"{piece} is missing (a piece of {path.name}); download it too")
    return found


def only_model(where: str, paths: Iterable[Path]) -> tuple[Path, ...]:
    """All the files of the one model that `paths` hold.

    Raises:
        CheckpointError: none or several (named) in `where`, or a piece missing.
    """
    models = {
        (path.parent, model_stem(path)): path
        for path in sorted(paths)
        if not any(part in path.name.lower() for part in _BESIDE)
    }
    if len(models) == 1:
        return pieces(*models.values())
    names = ", ".join(path.name for path in models.values())
    if models:
        raise CheckpointError(f"{where} has {len(models)} models: {names}; name one of the files")
    raise CheckpointError(f"{where} has no model's .gguf file; is the download complete?")


def check_pieces(paths: Sequence[Path], headers: Sequence[GgufHeader]) -> None:
    """Whether the pieces are of one model and together the whole of it.

    Raises:
        CheckpointError: they are not.
    """
    for number, (path, header) in enumerate(zip(paths, headers, strict=True)):
        wanted = {"split.no": number, "split.count": len(paths)}
        said = {key: header.metadata.get(key, wanted[key]) for key in wanted}
        if said["split.count"] == 0 and len(paths) == 1:
            continue
        if said != wanted:
            raise CheckpointError(
                f"{path} says that it is piece {said['split.no']!r} (from 0) of "
                f"{said['split.count']!r}, its name that it is {number} of {len(paths)}; give "
                "the pieces the names that they were published under"
            )
    held = sum(len(header.tensors) for header in headers)
    total = headers[0].metadata.get("split.tensors.count", held)
    if len({name for header in headers for name in header.tensors}) < held:
        raise CheckpointError(f"{paths[0]}: two pieces hold the same tensor; download them again")
    if total != held:
        raise CheckpointError(
            f"{paths[0]}: {total!r} tensors are promised, the pieces hold {held}; download them "
            "again"
        )
