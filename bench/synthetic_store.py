"""The store of a synthetic Mixture of Experts, written directly: no checkpoint, any codec.

The recipe is that of `tierrun.bench.synthetic` (a constant dimension of the embedding from which
every router reads the experts' popularity). Embedding, routers and norms are bf16; the other
resident matrices and the experts hold random codes (`tierrun.bench.random_weights`). A few dozen
distinct records serve all experts, each of which has a place of its own: speed does not depend on
what they hold, and the store is made as fast as the disk takes it.

    tierrun bench store STORE --like qwen3.6-35b-a3b --codec q4_k

(`python -m tierrun.bench.synthetic_store` is the same.)
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

import tierrun
from tierrun.bench.checkpoint import Shape, Weight, config_of
from tierrun.bench.random_weights import generator, matrix_bytes, weight_bytes
from tierrun.bench.report import run_script
from tierrun.bench.store_plan import (
    DataFile,
    StorePlan,
    expert_keys,
    plan_store,
    stored_dtype,
    stored_nbytes,
)
from tierrun.bench.synthetic_models import Routing
from tierrun.io.errors import DiskFullError, UsageError
from tierrun.io.extent import Extent, format_bytes
from tierrun.io.store import (
    MANIFEST,
    MODEL_DIR,
    ExpertKey,
    Layer,
    Manifest,
    Record,
    Resident,
    record_name,
)
from tierrun.tools.target import publish

DISTINCT_RECORDS = 64

_OURS = re.compile(r"^(experts|resident)-\d{5}-of-\d{5}\.safetensors$")
_THREADS = min(16, os.cpu_count() or 1)


class _Made(NamedTuple):
    """The bytes of a record or weight, and their xxh3-64."""

    data: memoryview
    checksum: int

    @staticmethod
    def of(values: torch.Tensor) -> "_Made":
        data = values.numpy().data
        return _Made(data, xxh3_64_intdigest(data))


def build_store(
    directory: Path,
    shape: Shape,
    codec: str = "q4_k",
    resident_codec: str = "q4_k",
    seed: int = 0,
    *,
    force: bool = False,
    name: str = "synthetic",
    routing: Routing = Routing.SEED,
) -> Manifest:
    """Write the store of a Qwen3-MoE of `shape`, its experts in `codec`; `force` replaces one.

    It says its `name`, and for which `routing` it was made: benchmarks feed it tokens accordingly.

    Raises:
        UsageError: dimensions that the codec cannot pack, a store there already, or a directory
            that cannot be written.
        StoreError: no such codec.
        DiskFullError: no room; nothing that could be opened is left.
    """
    plan = plan_store(shape, codec, resident_codec)
    with _disk_errors(directory, plan.nbytes):
        directory.mkdir(parents=True, exist_ok=True)
        _clear(directory, plan.nbytes, force)
        config_of(shape, tierrun_routing=routing).save_pretrained(directory / MODEL_DIR)
        with ThreadPoolExecutor(_THREADS) as pool:
            checksums = _write_residents(pool, directory, plan, seed)
            records = _make_records(pool, plan, seed)
            _write_experts(pool, directory, plan, records)
        identity = repr((shape, codec, resident_codec, seed, name, str(routing))).encode()
        fingerprint = xxh3_128_hexdigest(identity)
        manifest = _manifest(plan, checksums, records, fingerprint, name)
        publish(manifest, [directory])
    return manifest


# -- writing ----------------------------------------------------------------------------------


@contextmanager
def _disk_errors(directory: Path, needed: int) -> Iterator[None]:
    """Turns the operating system's errors into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(directory, needed) from None
        raise UsageError(f"{error.filename or directory} cannot be written ({error})") from None


def _disk_full(directory: Path, needed: int) -> DiskFullError:
    free = shutil.disk_usage(directory).free
    return DiskFullError(
        f"{directory}: disk full: the store needs {format_bytes(needed)}, {format_bytes(free)} free"
    )


def _clear(directory: Path, needed: int, force: bool) -> None:
    """See that there is room, and remove an older store; its manifest first, so it never lies."""
    old = [path for path in sorted(directory.iterdir()) if _OURS.match(path.name)]
    if (old or (directory / MANIFEST).exists()) and not force:
        raise UsageError(f"{directory} holds a store, or parts of one; use --force to replace it")
    replaced = sum(path.stat().st_blocks * 512 for path in old)
    if shutil.disk_usage(directory).free + replaced < needed:
        raise _disk_full(directory, needed)
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in old:
        path.unlink()


@contextmanager
def _writing(path: Path, file: DataFile) -> Iterator[int]:
    """The descriptor of `file` with its header in it; synced at the end, and not left in memory."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(descriptor, file.shard.nbytes)
        _write_all(descriptor, memoryview(file.header), 0)
        yield descriptor
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _write_residents(
    pool: ThreadPoolExecutor, directory: Path, plan: StorePlan, seed: int
) -> dict[str, int]:
    """Checksums by name."""
    file = plan.resident_file
    with _writing(directory / file.name, file) as descriptor:

        def write(numbered: tuple[int, Weight]) -> int:
            number, weight = numbered
            random = generator(seed, 0, number)
            made = _Made.of(weight_bytes(weight, plan.shape, plan.resident_codec, random))
            _write_all(descriptor, made.data, file.extents[weight.name].offset)
            return made.checksum

        checksums = list(pool.map(write, enumerate(plan.residents)))
    names = [weight.name for weight in plan.residents]
    return dict(zip(names, checksums, strict=True))


def _make_records(pool: ThreadPoolExecutor, plan: StorePlan, seed: int) -> list[_Made]:
    """The distinct records."""
    count = min(DISTINCT_RECORDS, plan.shape.layers * plan.shape.experts)

    def make(number: int) -> _Made:
        random, data = (
            generator(seed, 1, number),
            torch.zeros(plan.record.nbytes, dtype=torch.uint8),
        )
        for matrix in plan.record.matrices:
            made = matrix_bytes(matrix.codec, matrix.shape, random)
            data[matrix.extent.offset : matrix.extent.end] = made
        return _Made.of(data)

    return list(pool.map(make, range(count)))


def _write_experts(
    pool: ThreadPoolExecutor, directory: Path, plan: StorePlan, records: Sequence[_Made]
) -> None:
    chosen = {record_name(key): _chosen(key, records) for key in expert_keys(plan.shape)}

    def write(file: DataFile) -> None:
        with _writing(directory / file.name, file) as descriptor:
            for name, extent in file.extents.items():
                _write_all(descriptor, chosen[name].data, extent.offset)

    list(pool.map(write, plan.expert_files))


def _chosen(key: ExpertKey, records: Sequence[_Made]) -> _Made:
    return records[(key.layer + key.expert) % len(records)]


# -- the manifest -----------------------------------------------------------------------------


def _manifest(
    plan: StorePlan,
    checksums: dict[str, int],
    records: Sequence[_Made],
    fingerprint: str,
    name: str,
) -> Manifest:
    return Manifest(
        tool=f"tierrun {tierrun.__version__}",
        model_id=name,
        architecture=config_of(plan.shape).model_type,
        fingerprint=fingerprint,
        classes=(plan.record,),
        layers=tuple(_layers(plan, records)),
        residents=tuple(_resident(plan, weight, checksums) for weight in plan.residents),
        shards=tuple(file.shard for file in plan.files),
    )


def _layers(plan: StorePlan, records: Sequence[_Made]) -> Iterator[Layer]:
    places = {
        name: (shard, extent.offset)
        for shard, file in enumerate(plan.expert_files, 1)
        for name, extent in file.extents.items()
    }
    for layer in range(plan.shape.layers):
        keys = [ExpertKey(layer, expert) for expert in range(plan.shape.experts)]
        found = [Record(*places[record_name(k)], _chosen(k, records).checksum) for k in keys]
        yield Layer(f"model.layers.{layer}.mlp.experts", plan.shape.top_k, 0, tuple(found))


def _resident(plan: StorePlan, weight: Weight, checksums: dict[str, int]) -> Resident:
    place = plan.resident_file.extents[weight.name]
    extent = Extent(place.offset, stored_nbytes(weight, plan.resident_codec))
    dtype = stored_dtype(weight, plan.resident_codec)
    return Resident(weight.name, 0, dtype, weight.shape, extent, checksums[weight.name])


def _run() -> None:
    """As a script it is the command."""
    from tierrun.tools.bench_models import bench_store

    run_script(bench_store)


if __name__ == "__main__":
    _run()
