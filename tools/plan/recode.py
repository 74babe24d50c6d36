"""What a manifest becomes when its experts are in another codec."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.codecs.planes import packed_bytes
from tierrun.io.store import Manifest, RecordClass
from tierrun.tools.plan.sketch import arrange

CODEC_NAMES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
"""What a safetensors dtype is called as a codec."""


def recode(manifest: Manifest, codec: str) -> Manifest:
    """`manifest` with every matrix of an expert in `codec`; biases stay as they are.

    Raises:
        StoreError: no such codec.
    """
    old = [_recoded(record, codec) for record in manifest.classes]
    classes = list(dict.fromkeys(old))
    layers = (replace(x, record_class=classes.index(old[x.record_class])) for x in manifest.layers)
    return replace(manifest, classes=tuple(classes), layers=tuple(layers))


def matrix_bytes(codec: str, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix of `shape` in `codec`.

    Raises:
        StoreError: no such codec.
    """
    if codec in DTYPES:
        return prod(shape) * DTYPES[codec].itemsize
    return packed_bytes(find_codec(codec), shape)


def codecs_of(manifest: Manifest) -> str:
    """The codecs of the experts' matrices: `q4_k+q6_k`."""
    found = {m.codec for c in manifest.classes for m in c.matrices if len(m.shape) == 2}
    return "+".join(sorted(found))


def _recoded(record: RecordClass, codec: str) -> RecordClass:
    def matrices() -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        for matrix in record.matrices:
            if len(matrix.shape) == 2:
                yield matrix.name, codec, matrix.shape, matrix_bytes(codec, matrix.shape)
            else:
                yield matrix.name, matrix.codec, matrix.shape, matrix.extent.nbytes

    return arrange(matrices())
