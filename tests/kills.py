"""Conversions killed with SIGKILL at random moments.

python -m tests.kills --count 10 SOURCE STORE    keep killing, then finish
"""

import argparse
import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tierrun.io.store import MANIFEST
from tierrun.tools import writer
from tierrun.tools.convert import convert
from tierrun.tools.journal import JOURNAL


def convert_with_kills(
    source: Path, directories: Sequence[Path], *, kills: int, seed: int = 0
) -> int:
    """Convert `source` into `directories`, killed up to `kills` times, then undisturbed.

    Returns how often a conversion was killed before it had finished. A kill comes after a random
    number of journaled items and a random pause, so that it meets any line of the code.
    """
    moments = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tierrun.tools.convert"])
    for killed in range(kills):
        child = context.Process(target=_convert, args=(source, list(directories)))
        _start(child)
        _await_items(child, directories[0] / JOURNAL, moments.randint(0, 2))
        time.sleep(moments.uniform(0, 0.02))
        child.kill()
        child.join()
        if child.exitcode != -signal.SIGKILL:
            return killed
        assert not (directories[0] / MANIFEST).exists()
    convert(source, directories)
    return kills


def _start(child: BaseProcess) -> None:
    """Start `child`, which finds this module as `tests.kills` wherever pytest found it."""
    root = str(Path(__file__).parents[1])
    sys.path.append(root)
    try:
        child.start()
    finally:
        sys.path.remove(root)


def _await_items(child: BaseProcess, journal: Path, count: int) -> None:
    """Wait until `child` has begun and journaled `count` items, or has ended."""
    before = _lines(journal) or 1
    while child.is_alive() and _lines(journal) < before + count:
        time.sleep(0.001)


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def _convert(source: Path, directories: Sequence[Path]) -> None:
    writer.BATCH_BYTES = 1 << 20  # so that a small checkpoint has many moments to be killed in
    convert(source, directories)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("source", type=Path)
    parser.add_argument("store", type=Path)
    options = parser.parse_args()
    killed = convert_with_kills(
        options.source, [options.store], kills=options.count, seed=options.seed
    )
    print(f"killed {killed} times, then finished")


if __name__ == "__main__":
    main()
