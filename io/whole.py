"""Small files that others may read at any moment: the old contents or the new ones, never half."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace what `path` holds by `text`; its directory is made.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(text)
    draft.replace(path)
