"""Readers fed with damaged files for minutes: only our errors come out, and memory is bounded.

python -m tests.fuzz gguf --minutes 10    or: safetensors, manifest
"""

import argparse
import contextlib
import logging
import random
import re
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from tests.checkpoints import tiny_checkpoint
from tests.ggufs import FIXTURES, metadata_pair
from tokenizers import Tokenizer

from tierrun.io.errors import TierrunError
from tierrun.io.header import read_header
from tierrun.io.store import MANIFEST, Manifest
from tierrun.tools.convert import convert
from tierrun.tools.sources.gguf import GgufCheckpoint
from tierrun.tools.sources.gguf_header import read_gguf_header

MEMORY = 1 << 30
"""Bytes of address space beyond what the imports took; more fails as MemoryError."""

SECONDS = 5.0
"""The longest that one file may take."""

_NUMBERS = (0, 1, 2, 3, 7, 8, 9, 0x7F, 0xFF, 1 << 15, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32,
            1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1)  # fmt: skip


class Target:
    """Seeds, how to change one, and what reads the result."""

    def __init__(
        self,
        seeds: list[bytes],
        read: Callable[[bytes], None],
        change: Callable[[random.Random, bytes], bytes],
    ) -> None:
        self.seeds, self.read, self.change = seeds, read, change


def mutate(chance: random.Random, seed: bytes) -> bytes:
    """`seed` with a few bytes flipped, put in, taken out, cut off, or made a telling number."""
    data = bytearray(seed)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0:
                data[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                data[place:place] = chance.randbytes(chance.randrange(1, 12))
            case 2:
                del data[place : place + chance.choice((1, 4, 8, 100))]
            case 3:
                del data[max(place, 1) :]
            case 4:
                data[place : place + 8] = chance.choice(_NUMBERS).to_bytes(8, "little")
            case _:
                other = chance.randrange(len(data) + 1)
                data[place : place + 64] = data[other : other + 64]
    return bytes(data)


def mutate_text(chance: random.Random, seed: bytes) -> bytes:
    """As `mutate`, or with one of the numbers written in the text replaced."""
    places = list(re.finditer(rb"-?\d+(\.\d+)?|\"[^\"]*\"|true|null", seed))
    if not places or chance.random() < 0.3:
        return mutate(chance, seed)
    place = chance.choice(places)
    new = chance.choice(
        (*map(str, _NUMBERS), "-1", "1e999", "NaN", '""', "[]", "{}", "null", "[[1")
    )
    return seed[: place.start()] + new.encode() + seed[place.end() :]


@contextlib.contextmanager
def gguf_target() -> Iterator[Target]:
    """Headers, then configuration, tokenizer and some tensors of what passes."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "mutant.gguf"
        files = [file for file in sorted(FIXTURES.glob("*/*.gguf")) if "-of-" not in file.name]
        seeds = [file.read_bytes() for file in files]
        metadata = [read_gguf_header(file).metadata for file in files]
        numbers = {seed: index for index, seed in enumerate(seeds)}

        def change(chance: random.Random, seed: bytes) -> bytes:
            # small enough that most changes meet the header, and one in two its values
            if chance.random() < 0.5:
                return change_value(chance, seed, metadata[numbers[seed]])
            end = seed.rfind(b"blk.") + 200
            return mutate(chance, seed[:end]) + seed[end:]

        def read(data: bytes) -> None:
            path.write_bytes(data)
            with GgufCheckpoint.open([path], requant=True) as checkpoint:
                if (checkpoint.directory / "tokenizer.json").is_file():
                    Tokenizer.from_file(str(checkpoint.directory / "tokenizer.json"))
                for name in list(checkpoint.tensors)[:4]:
                    checkpoint.elements(name, 0, min(64, checkpoint.tensors[name][1].shape[-1]))

        yield Target(seeds, read, change)


def change_value(chance: random.Random, seed: bytes, metadata: dict[str, Any]) -> bytes:
    """The file with one key's value replaced by another of any type, well-formed."""
    keys = [key for key in metadata if not isinstance(metadata[key], list)]
    lists = [key for key in metadata if isinstance(metadata[key], list) and metadata[key]]
    key = chance.choice(keys + lists)
    old = metadata_pair(key, metadata[key])
    new = chance.choice(
        (0, 1, -1, (1 << 31) - 1, (1 << 32) - 1, 1e30, float("nan"), True, "", "x", "default",
         [], [0], [1, 2, 3], ["a", "b"], [-1.5], [[metadata[key]]])
    )  # fmt: skip
    if isinstance(new, list) and new and isinstance(new[0], list):
        new = _shuffled(chance, metadata[key])
    start = seed.find(old[: 12 + len(key)])
    return seed[:start] + metadata_pair(key, new) + seed[start + len(old) :]


def _shuffled(chance: random.Random, value: Any) -> Any:
    if not isinstance(value, list):
        return [value]
    changed = list(value)
    for _ in range(chance.randrange(1, 8)):
        changed[chance.randrange(len(changed))] = changed[chance.randrange(len(changed))]
    return changed[: chance.randrange(1, len(changed) + 1)] if chance.random() < 0.5 else changed


@contextlib.contextmanager
def safetensors_target() -> Iterator[Target]:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "mutant.safetensors"
        source = tiny_checkpoint("mixtral", Path(directory) / "source")
        seed = (source / "model.safetensors").read_bytes()
        header = 8 + int.from_bytes(seed[:8], "little")

        def change(chance: random.Random, seed: bytes) -> bytes:
            if chance.random() < 0.2:
                return mutate(chance, seed[:header]) + seed[header:]
            text = mutate_text(chance, seed[8:header])
            return len(text).to_bytes(8, "little") + text + seed[header:]

        def read(data: bytes) -> None:
            path.write_bytes(data)
            read_header(path)

        yield Target([seed], read, change)


@contextlib.contextmanager
def manifest_target() -> Iterator[Target]:
    with TemporaryDirectory() as directory:
        source = tiny_checkpoint("mixtral", Path(directory) / "source")
        convert(source, Path(directory) / "store")
        seed = (Path(directory) / "store" / MANIFEST).read_bytes()
    yield Target([seed], _read_manifest, mutate_text)


def _read_manifest(data: bytes) -> None:
    Manifest.from_json(data.decode(errors="replace"), Path(MANIFEST))


TARGETS = {"gguf": gguf_target, "safetensors": safetensors_target, "manifest": manifest_target}


def fuzz(target: Target, seconds: float, chance: random.Random) -> tuple[Counter[str], list[str]]:
    """How often each outcome came, and the failures: `repr` of the error."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(failures) < 20:
        data = target.change(chance, chance.choice(target.seeds))
        start = time.monotonic()
        try:
            target.read(data)
            outcomes["read"] += 1
        except TierrunError as error:
            outcomes[type(error).__name__] += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                failures.append(f"not one line: {str(error)[:300]!r}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            failures.append(_keep(data, error))
        if time.monotonic() - start > SECONDS:
            failures.append(_keep(data, TimeoutError(f"{time.monotonic() - start:.1f} s")))
    return outcomes, failures


def _keep(data: bytes, error: BaseException) -> str:
    """The failure in words, with its file kept."""
    path = Path(mkdtemp(prefix="tierrun-fuzz-")) / "mutant"
    path.write_bytes(data)
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" at {where[0].filename}:{where[0].lineno}" if where else ""
    return f"{type(error).__name__}: {str(error)[:200]}{place} ({path})"


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with TARGETS[options.target]() as target:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit_memory()
        outcomes, failures = fuzz(target, options.minutes * 60, random.Random(options.seed))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    print(f"{options.target}: {sum(outcomes.values())} files: {counts}; {grown} MiB more memory")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
