"""What is read: in each directory the store that it holds, or a test file."""

import itertools
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tierrun.io.measuring import Place
from tierrun.io.store import MANIFEST, ExpertKey, Store

MOST_PLACES = 1 << 16
"""That are read in turn; of a large store not every place is listed."""


@dataclass(frozen=True, slots=True)
class Source:
    """The files to read in one directory; `records` are where a store's own records lie, by size.

    `what` says what the files are, in a clause.
    """

    directory: Path
    paths: tuple[Path, ...]
    what: str
    records: Mapping[int, Sequence[Place]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def num_places(self, nbytes: int) -> int:
        """How many reads of `nbytes` do not overlap."""
        return len(self.records.get(nbytes, ())) or self._ends(nbytes)[-1]

    def places(self, nbytes: int, *, shuffled: bool, seed: int) -> list[Place]:
        """Places to read `nbytes` at, none twice: any of all, or a stretch in file order."""
        count = self.num_places(nbytes)
        most, chance = min(MOST_PLACES, count), random.Random(seed)
        first = chance.randrange(count - most + 1)
        return self._at(
            nbytes, chance.sample(range(count), most) if shuffled else range(first, first + most)
        )

    def first_places(self, nbytes: int, *, shuffled: bool, most: int) -> list[Place]:
        """The first `most` in file order, shuffled or not: the same of the files for any size."""
        chosen = list(range(min(most, self.num_places(nbytes))))
        if shuffled:
            random.Random(0).shuffle(chosen)
        return self._at(nbytes, chosen)

    def _at(self, nbytes: int, numbers: Iterable[int]) -> list[Place]:
        """Places by number: the store's records of that size where it has some, else multiples."""
        records, ends = self.records.get(nbytes), self._ends(nbytes)
        return [records[i] if records else _place(ends, i, nbytes) for i in numbers]

    def _ends(self, nbytes: int) -> list[int]:
        """How many places the files have up to each of them."""
        return list(itertools.accumulate(path.stat().st_size // nbytes for path in self.paths))

    def largest_file(self) -> "Source":
        """The largest of the files alone, without its records: what fio can read alike."""
        path = max(self.paths, key=lambda path: path.stat().st_size)
        return Source(self.directory, (path,), self.what)


def _place(ends: Sequence[int], index: int, nbytes: int) -> Place:
    file = bisect_right(ends, index)
    before = ends[file - 1] if file else 0
    return Place(file, (index - before) * nbytes)


def stored_sources(directories: Sequence[Path]) -> dict[Path, Source]:
    """The directories that hold shards of a store whose manifest is in one of them.

    Raises:
        StoreError, CorruptError, VersionError: a store that cannot be opened.
    """
    found: dict[Path, Source] = {}
    for directory in directories:
        if directory not in found and (directory / MANIFEST).is_file():
            others = [other for other in directories if other != directory]
            store = Store.open([directory, *others])
            found |= {source.directory: source for source in _sources(store)}
    return found


def _sources(store: Store) -> Iterator[Source]:
    for directory in store.roots:
        shards = [i for i, path in enumerate(store.shard_paths) if path.parent == directory]
        if shards:
            what = f"the store of {store.manifest.model_id or 'a model'}"
            paths = tuple(store.shard_paths[i] for i in shards)
            yield Source(directory, paths, what, _records(store, shards))


def _records(store: Store, shards: Sequence[int]) -> dict[int, list[Place]]:
    """The records in some shards, which are counted from the first of them, in file order."""
    numbers, found = {shard: n for n, shard in enumerate(shards)}, dict[int, list[Place]]()
    for layer, experts in enumerate(store.manifest.layers):
        for expert in range(len(experts.records)):
            record, extent = store.locate(ExpertKey(layer, expert))
            if record.shard in numbers:
                place = Place(numbers[record.shard], record.offset)
                found.setdefault(extent.nbytes, []).append(place)
    return {nbytes: sorted(places) for nbytes, places in found.items()}
