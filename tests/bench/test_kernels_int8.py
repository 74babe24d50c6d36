"""The scripts about int8 activations run, and what they round to a codec is near."""

import json
from pathlib import Path

import pytest
import torch

from tierrun.bench import kernels_int8, quality_int8
from tierrun.engine.codecs.codec import find_codec


def test_rates_of_both_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels_int8, "SECONDS", 0.0)
    out = tmp_path / "int8.json"
    kernels_int8.main(out, "q8_0,fp8_g128_f32", "1,2", "1", hidden=128, inner=32, mib=1, rounds=1)
    found = json.loads(out.read_text())
    paths = [(r["codec"], r["path"], r["place"], r["tokens"]) for r in found["results"]]
    assert len(set(paths)) == len(paths) == 12
    assert found["relative_errors"]["q8_0"]["fp32"] < 1e-5
    assert 1e-4 < found["relative_errors"]["q8_0"]["int8"] < 0.03
    assert "of reading" in capsys.readouterr().out


@pytest.mark.parametrize("name", kernels_int8.CODECS)
def test_rounding_is_as_near_as_the_bits_allow(name: str) -> None:
    values = torch.randn(40, 512, generator=torch.Generator().manual_seed(1)) * 0.05
    codec = find_codec(name)
    if codec.book == "e4m3":
        pytest.skip("has no int8 kernel")
    error = (quality_int8.rounded(codec, values).dense() - values).norm() / values.norm()
    assert error < {8: 0.02, 6: 0.04, 5: 0.06, 4: 0.2, 3: 0.3, 2: 0.5}[codec.bits]
