"""Codecs that hold exactly what another holds, in more bits: Q5_K what Q4_K, Q8_0 what Q4_0.

A weight made of rows in several codecs stays packed in the widest, where that one holds the others.
"""

from collections.abc import Iterable

import torch

from tierrun.engine.codecs.codec import Codec
from tierrun.engine.codecs.planes import Fields


def common(codecs: Iterable[Codec | None]) -> Codec | None:
    """That one of `codecs` which holds all the others, if there is one."""
    found = list(codecs)
    kinds = [codec for codec in found if codec is not None]
    if len(kinds) < len(found):
        return None
    return next((wide for wide in kinds if all(holds(wide, codec) for codec in kinds)), None)


def holds(wide: Codec, narrow: Codec) -> bool:
    """Whether every matrix in `narrow` is one in `wide`, with other codes under the same scales."""
    if wide == narrow:
        return True
    if wide.book or (wide.scale, wide.minimum) != (narrow.scale, narrow.minimum):
        return False
    if wide.zero_point or narrow.zero_point:
        return False
    codes = narrow.numbers() + wide.zero
    inside = (codes == codes.round()) & (codes >= 0) & (codes < 1 << wide.bits)
    return bool(inside.all())


def widen(fields: Fields, narrow: Codec, wide: Codec) -> Fields:
    """The rows of `fields`, in `narrow`, as rows in `wide`, which holds it."""
    if wide == narrow:
        return fields
    codes = (narrow.numbers() + wide.zero).to(torch.uint8)
    return fields._replace(codes=codes[fields.codes.int()])
