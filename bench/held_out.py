"""Text that the demo model was not trained on: its held-out part of Python's standard library.

The model comes from CPython 3.13's sources; which files were held out follows from their names, so
the running interpreter's own copies of them serve, and nothing is downloaded.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tierrun.tools.demo.corpus import LARGEST_FILE_BYTES, Document


def held_out_texts() -> Iterator[str]:
    """The held-out modules of the standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/")) or "test" in name:
            continue
        if path.stat().st_size <= LARGEST_FILE_BYTES:
            document = Document("code", f"Lib/{name}", path.read_text(errors="replace"))
            if document.split == "held":
                yield document.text
