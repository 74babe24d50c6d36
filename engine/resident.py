"""The resident weights: mapped from the store, as stored, checked once at load."""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash

from tierrun.engine.codecs.codec import find_codec, is_codec
from tierrun.engine.codecs.dense import SAFETENSORS_DTYPES
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.weight import Weight
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

    def weight(self, name: str) -> Weight:
        """The weight called `name` as it is stored.

        Raises:
            StoreError: not in the store, or of a dtype or codec unknown here.
            CorruptError: its bytes are not those of its shape.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise StoreError(
                f"{self._store.roots[0]} has no weight {name}; convert the model again"
            )
        if entry.dtype in SAFETENSORS_DTYPES:
            return self._elements(entry, SAFETENSORS_DTYPES[entry.dtype]).view(entry.shape)
        if not is_codec(entry.dtype):
            raise StoreError(f"{name} is in {entry.dtype}, unknown to this tierrun; update it")
        data = self._elements(entry, torch.uint8)
        return Packed.over(data, find_codec(entry.dtype), entry.shape, self._inputs(entry))

    def _inputs(self, entry: Resident) -> torch.Tensor | None:
        """The order of the stored columns, int64 [in]; None where it is the model's."""
        if entry.inputs is None:
            return None
        order = self.weight(entry.inputs)
        if isinstance(order, Packed) or order.shape != entry.shape[-1:]:
            raise StoreError(f"{entry.inputs} is not an order of the columns of {entry.name}")
        return order.to(torch.int64)

    def _elements(self, entry: Resident, dtype: torch.dtype) -> torch.Tensor:
        if entry.extent.nbytes == 0:
            return torch.empty(0, dtype=dtype)
        count = entry.extent.nbytes // dtype.itemsize
        return torch.frombuffer(
            self._maps[entry.shard], dtype=dtype, count=count, offset=entry.extent.offset
        )

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
