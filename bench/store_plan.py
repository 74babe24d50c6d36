"""Where everything in a synthetic store goes, settled from its dimensions alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from tierrun.bench.checkpoint import Shape, Weight, weights
from tierrun.bench.random_weights import matrix_nbytes
from tierrun.engine.codecs.dense import DTYPE_NAMES, DTYPES
from tierrun.io.extent import PAGE, Extent, align_up
from tierrun.io.header import build_header
from tierrun.io.store import ExpertKey, Matrix, RecordClass, Shard, record_name
from tierrun.tools.layout import MATRIX_ALIGNMENT

SHARD_BYTES = 2 << 30
"""Small, since each file has its own writer: the kernel lets one at a time write into a file."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file to be: its name, its header, and the place of each of its tensors."""

    name: str
    header: bytes
    extents: dict[str, Extent]

    @property
    def shard(self) -> Shard:
        nbytes = max(extent.end for extent in self.extents.values())
        return Shard(self.name, nbytes, len(self.header), xxh3_64_intdigest(self.header))


@dataclass(frozen=True, slots=True)
class StorePlan:
    """Everything about the store but its checksums."""

    shape: Shape
    resident_codec: str
    record: RecordClass
    residents: tuple[Weight, ...]
    resident_file: DataFile
    expert_files: tuple[DataFile, ...]

    @property
    def files(self) -> tuple[DataFile, ...]:
        return (self.resident_file, *self.expert_files)

    @property
    def nbytes(self) -> int:
        return sum(file.shard.nbytes for file in self.files)


def plan_store(shape: Shape, codec: str, resident_codec: str) -> StorePlan:
    """The plan of a Qwen3-MoE of `shape`.

    Raises:
        UsageError: dimensions that a codec cannot pack.
        StoreError: no such codec.
    """
    record = _record_class(shape, codec)
    residents = tuple(weight for weight in weights(shape) if ".experts." not in weight.name)
    packed = resident_codec not in DTYPES
    # Packed weights first: their planes are aligned, and each fills its room up to the next.
    ordered = sorted(residents, key=lambda weight: packed and weight.kind != "noise")
    entries = {weight.name: _entry(weight, resident_codec) for weight in ordered}
    header, extents = build_header(entries, {"format": "pt"})
    resident_file = DataFile("resident-00001-of-00001.safetensors", header, extents)
    files = tuple(_expert_files(shape, record.nbytes))
    return StorePlan(shape, resident_codec, record, tuple(ordered), resident_file, files)


def _record_class(shape: Shape, codec: str) -> RecordClass:
    matrices, offset = [], 0
    for name, dimensions in (
        ("gate_up_proj", (2 * shape.intermediate, shape.hidden)),
        ("down_proj", (shape.hidden, shape.intermediate)),
    ):
        offset = align_up(offset, MATRIX_ALIGNMENT)
        extent = Extent(offset, matrix_nbytes(codec, dimensions))
        matrices.append(Matrix(name, codec, dimensions, extent))
        offset = extent.end
    return RecordClass(align_up(offset), tuple(matrices))


def stored_dtype(weight: Weight, codec: str) -> str:
    """What the manifest calls the type of `weight`: a safetensors dtype, or a codec."""
    if weight.kind != "noise":
        return "BF16"
    return DTYPE_NAMES[DTYPES[codec]] if codec in DTYPES else codec


def stored_nbytes(weight: Weight, codec: str) -> int:
    """Bytes of `weight`, without what fills its room up."""
    return matrix_nbytes(codec, weight.shape) if weight.kind == "noise" else weight.nbytes


def _entry(weight: Weight, codec: str) -> tuple[str, tuple[int, ...], int]:
    """What the file says of `weight`: dtype, shape, bytes."""
    nbytes = stored_nbytes(weight, codec)
    if weight.kind != "noise" or codec in DTYPES:
        return stored_dtype(weight, codec), weight.shape, nbytes
    nbytes = align_up(nbytes, MATRIX_ALIGNMENT)
    return "U8", (nbytes,), nbytes


def expert_keys(shape: Shape) -> list[ExpertKey]:
    """Every expert, in file order."""
    pairs = ((layer, expert) for layer in range(shape.layers) for expert in range(shape.experts))
    return [ExpertKey(layer, expert) for layer, expert in pairs]


def _expert_files(shape: Shape, record_nbytes: int) -> Iterator[DataFile]:
    keys, per_file = expert_keys(shape), max(1, SHARD_BYTES // (record_nbytes + PAGE))
    count = -(-len(keys) // per_file)
    for number in range(count):
        some = keys[number * per_file : (number + 1) * per_file]
        entries = {record_name(key): ("U8", (record_nbytes,), record_nbytes) for key in some}
        name = f"experts-{number + 1:05d}-of-{count:05d}.safetensors"
        yield DataFile(name, *build_header(entries, {"format": "pt"}))
