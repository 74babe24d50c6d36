"""Stores made by hand, without a model, and a reader without files."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from tierrun.io.extent import PAGE, Extent
from tierrun.io.header import build_header
from tierrun.io.store import (
    MANIFEST,
    ExpertKey,
    Layer,
    Manifest,
    Matrix,
    Record,
    RecordClass,
    Shard,
    Store,
    record_name,
)


class Experts(NamedTuple):
    """One layer of a store made by hand: experts, experts per token, pages per record."""

    num: int = 6
    top_k: int = 2
    pages: int = 1


@dataclass(frozen=True)
class TinyStore:
    """A store and the bytes of its shards; on disk only once `write` was called."""

    store: Store
    images: tuple[bytes, ...]

    def record(self, key: ExpertKey) -> bytes:
        """The true bytes of an expert."""
        record, extent = self.store.locate(key)
        return self.images[record.shard][extent.offset : extent.end]

    def write(self) -> Store:
        """Write shards and manifest, and open what was written."""
        for path, image in zip(self.store.shard_paths, self.images, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        (self.store.roots[0] / MANIFEST).write_text(self.store.manifest.to_json())
        return Store.open(self.store.roots)


def tiny_store(
    layers: Sequence[Experts] = (Experts(), Experts(), Experts()),
    roots: Sequence[Path] = (Path("store"),),
    seed: int = 0,
) -> TinyStore:
    """Layers of random records, dealt round-robin over one shard per root."""
    pages = sorted({layer.pages for layer in layers})
    keys = [
        ExpertKey(number, expert)
        for number, layer in enumerate(layers)
        for expert in range(layer.num)
    ]
    generator = np.random.default_rng(seed)
    contents = {key: generator.bytes(layers[key.layer].pages * PAGE) for key in keys}
    images, shards, places = [], [], {}
    for index in range(len(roots)):
        mine = keys[index :: len(roots)]
        image, header_bytes, extents = _image({key: contents[key] for key in mine})
        name = f"experts-{index + 1:05}-of-{len(roots):05}.safetensors"
        shards.append(Shard(name, len(image), header_bytes, _xxh3(image[:header_bytes])))
        images.append(image)
        places |= {
            key: Record(index, extents[record_name(key)].offset, _xxh3(contents[key]))
            for key in mine
        }
    manifest = Manifest(
        tool="tests",
        model_id="tiny/store",
        architecture="none",
        fingerprint=f"{seed:016x}",
        classes=tuple(_record_class(count) for count in pages),
        layers=tuple(
            Layer(
                path=f"layers.{number}.experts",
                top_k=layer.top_k,
                record_class=pages.index(layer.pages),
                records=tuple(places[ExpertKey(number, e)] for e in range(layer.num)),
            )
            for number, layer in enumerate(layers)
        ),
        residents=(),
        shards=tuple(shards),
    )
    paths = tuple(root / shard.name for root, shard in zip(roots, shards, strict=True))
    return TinyStore(Store(manifest, tuple(roots), paths), tuple(images))


def _image(records: dict[ExpertKey, bytes]) -> tuple[bytes, int, dict[str, Extent]]:
    shapes = {record_name(key): ("U8", (len(data),), len(data)) for key, data in records.items()}
    header, extents = build_header(shapes, {"format": "tests"})
    return header + b"".join(records.values()), len(header), extents


def _record_class(pages: int) -> RecordClass:
    nbytes = pages * PAGE
    return RecordClass(nbytes, (Matrix("up_proj", "f32", (pages, PAGE // 4), Extent(0, nbytes)),))


def _xxh3(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


FOREVER = 1 << 30
"""Failures of a place that never heals."""


@dataclass
class FakeReader:
    """A `Reader` over bytes in memory; slow, failing or lying on demand.

    `failures` and `flips` count, by (shard, offset of a read), the reads yet to fail with `errno`
    and those yet to come with a bit flipped. While `held` says so of a read, it waits.
    """

    images: Sequence[bytes]
    delay: Callable[[int, int], float] = lambda shard, offset: 0.0
    held: Callable[[int, int], bool] = lambda shard, offset: False
    errno: int = 5
    error: Callable[[int], Exception] = lambda errno: OSError(errno, "injected")
    failures: Counter[tuple[int, int]] = field(default_factory=Counter)
    flips: Counter[tuple[int, int]] = field(default_factory=Counter)
    calls: list[tuple[int, int, int]] = field(default_factory=list)
    in_flight: Counter[int] = field(default_factory=Counter)
    most_in_flight: Counter[int] = field(default_factory=Counter)
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    name: str = "fake"

    def read(self, shard: int, offset: int, into: memoryview) -> None:
        assert not self.closed, "read after close"
        with self.lock:
            self.calls.append((shard, offset, len(into)))
            self.in_flight[shard] += 1
            self.most_in_flight[shard] = max(self.most_in_flight[shard], self.in_flight[shard])
        try:
            time.sleep(self.delay(shard, offset))
            while self.held(shard, offset):
                time.sleep(0.0005)
            with self.lock:
                self._answer(shard, offset, into)
        finally:
            with self.lock:
                self.in_flight[shard] -= 1

    def _answer(self, shard: int, offset: int, into: memoryview) -> None:
        place = (shard, offset)
        if self.failures[place] > 0:
            self.failures[place] -= 1
            raise self.error(self.errno)
        into[:] = self.images[shard][offset : offset + len(into)]
        if self.flips[place] > 0:
            self.flips[place] -= 1
            into[len(into) // 2] ^= 1

    def close(self) -> None:
        assert not sum(self.in_flight.values()), "closed with reads in flight"
        self.closed = True


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until it holds; an event of another thread comes, however slow the machine."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)
