"""Gate and up as matrices of their own give what the one matrix of both gives."""

from types import SimpleNamespace

import pytest
import torch
from tests.codecs import random_packed
from torch.nn.functional import linear

from tierrun.engine.experts import Matrices, _gate_up
from tierrun.engine.kernels.cpu import CpuKernels


@pytest.mark.parametrize("is_concatenated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_gate_and_up_of_different_codecs(is_concatenated: bool, biased: bool) -> None:
    gate, up = random_packed("q8_0", 48, 256), random_packed("q4_k", 48, 256, seed=1)
    both = [gate.dense(), up.dense()]
    joined = torch.cat(both) if is_concatenated else torch.stack(both, 1).flatten(0, 1)
    bias, x = torch.randn(96) if biased else None, torch.randn(3, 256)
    matrices: Matrices = {"gate_proj": gate, "up_proj": up}
    if bias is not None:
        matrices["gate_up_proj_bias"] = bias
    module = SimpleNamespace(is_concatenated=is_concatenated)
    got = _gate_up(module, x, matrices, CpuKernels())
    torch.testing.assert_close(got, linear(x, joined, bias), rtol=1e-4, atol=1e-2)
