"""The resident weights: mapped from the store, as stored, checked once at load."""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash

from tierrun.engine.codecs.dense import SAFETENSORS_DTYPES
from tierrun.io.errors import CorruptError, StoreError
from tierrun.io.store import Resident, Store


class ResidentWeights:
    """Named tensors over mappings of the store's resident shards; nothing is copied.

    The mappings live as long as any tensor over them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._entries = {resident.name: resident for resident in store.manifest.residents}
        shards = {resident.shard for resident in store.manifest.residents}
        self._maps = {shard: _map(str(store.shard_paths[shard])) for shard in shards}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def nbytes(self) -> int:
        return self._store.manifest.resident_bytes

    def tensor(self, name: str) -> torch.Tensor:
        """The weight called `name` in its stored dtype and shape.

        Raises:
            StoreError: not in the store, or of a dtype unknown here.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise StoreError(
                f"{self._store.roots[0]} has no weight {name}; convert the model again"
            )
        if entry.dtype not in SAFETENSORS_DTYPES:
            raise StoreError(f"{name} has dtype {entry.dtype}, unknown to this tierrun; update it")
        dtype = SAFETENSORS_DTYPES[entry.dtype]
        if entry.extent.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        count = entry.extent.nbytes // dtype.itemsize
        flat = torch.frombuffer(
            self._maps[entry.shard], dtype=dtype, count=count, offset=entry.extent.offset
        )
        return flat.view(entry.shape)

    def verify(self) -> None:
        """Compare every weight with its checksum, which also brings the mapping into memory.

        Raises:
            CorruptError: names the shard and the tensor.
        """
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for entry, good in zip(
                self._entries.values(), pool.map(self._matches, self._entries.values()), strict=True
            ):
                if not good:
                    path = self._store.shard_paths[entry.shard]
                    raise CorruptError(
                        f"{path}: resident weight {entry.name} differs from its checksum; "
                        "convert the model again"
                    )

    def _matches(self, entry: Resident) -> bool:
        view = memoryview(self._maps[entry.shard])[entry.extent.offset : entry.extent.end]
        return xxhash.xxh3_64_intdigest(view) == entry.checksum


def _map(path: str) -> mmap.mmap:
    """A private mapping: torch wants writable memory, nothing ever writes to it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    finally:
        os.close(fd)
