"""The script about quality with int8 activations: what it rounds to a codec is near."""

import pytest
import torch

from tierrun.bench import quality_int8
from tierrun.engine.codecs.codec import find_codec


@pytest.mark.parametrize("name", quality_int8.CODECS)
def test_rounding_is_as_near_as_the_bits_allow(name: str) -> None:
    values = torch.randn(40, 512, generator=torch.Generator().manual_seed(1)) * 0.05
    codec = find_codec(name)
    error = (quality_int8.rounded(codec, values).dense() - values).norm() / values.norm()
    assert error < {8: 0.02, 6: 0.04, 5: 0.06, 4: 0.2, 3: 0.3, 2: 0.5}[codec.bits]
