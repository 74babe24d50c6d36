"""Published formats of quantised weights run as transformers' own dequantised forward."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import native
from tests.checkpoints import quiet
from tests.engine.models import save_runnable
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers import FineGrainedFP8Config, Mxfp4Config

import tierrun
from tierrun.io.errors import CheckpointError
from tierrun.io.store import Manifest
from tierrun.tools.convert import convert

TOKENS = list(range(3, 43))
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
}


def tiny(family: str, directory: Path, **numbers: Any) -> Path:
    with quiet():
        save_runnable(family, directory, **WIDE | numbers)
    return directory


def ours(source: Path, store: Path) -> torch.Tensor:
    convert(source, store)
    with tierrun.load(store, vram="0", ram="64MiB") as engine:
        return engine.logits(TOKENS)


def theirs(source: Path, config: Any = None) -> torch.Tensor:
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, quantization_config=config
        )
        return model(torch.tensor([TOKENS])).logits[0]


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    print(f"largest difference {(got - wanted).abs().max():.1e} of {wanted.abs().max():.1f}")
    assert wanted.abs().max() > 0.5
    assert (got - wanted).abs().max() < 1e-4


def codecs(manifest: Manifest) -> tuple[set[str], set[str]]:
    """Of the matrices of the records, and of the resident weights."""
    matrices = {m.codec for c in manifest.classes for m in c.matrices if len(m.shape) == 2}
    return matrices, {r.dtype for r in manifest.residents} - {"F32", "BF16"}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "minimax_m2", "glm4_moe"])
def test_fp8_in_blocks(family: str, tmp_path: Path) -> None:
    source = tiny(family, tmp_path / "source", moe_intermediate_size=256)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}

    def chosen(name: str) -> bool:
        return native.is_projection(name) or (".experts." in name and name.endswith("weight"))

    native.rewrite(source, chosen, native.fp8((128, 128)), config)
    got = ours(source, tmp_path / "store")
    assert_same(got, theirs(source, FineGrainedFP8Config(dequantize=True)))
    manifest = tierrun.io.store.read_manifest(tmp_path / "store")
    experts, residents = codecs(manifest)
    assert experts <= {"fp8_g128_f32", "fp8_row_f32"} and "fp8_g128_f32" in experts
    assert residents <= experts | {"fp8_row_f32"}
