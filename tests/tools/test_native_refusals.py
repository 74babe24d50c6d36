"""What quantised checkpoints lack, or have wrong, is named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import native

from tierrun.io.errors import CheckpointError
from tierrun.tools.convert import convert


def spoil(source: Path, change: Callable[[native.Tensors], None]) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native.ragged(tmp_path_factory.mktemp("fp8") / "source")


@pytest.fixture
def spoilt(blocks: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(blocks, tmp_path / "source"))


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_scales_that_are_not_finite_are_named(spoilt: Path, tmp_path: Path) -> None:
    def change(tensors: native.Tensors) -> None:
        tensors[f"{EXPERT}_scale_inv"][1, 0] = float("nan")

    spoil(spoilt, change)
    with pytest.raises(CheckpointError, match=f"{EXPERT}_scale_inv has a scale for row 128 "):
        convert(spoilt, tmp_path / "store")


def test_missing_scales_are_named(spoilt: Path, tmp_path: Path) -> None:
    spoil(spoilt, lambda tensors: tensors.pop(f"{EXPERT}_scale_inv"))
    with pytest.raises(CheckpointError, match=f"{EXPERT}_scale_inv is missing"):
        convert(spoilt, tmp_path / "store")


def test_scales_of_another_shape_are_named(spoilt: Path, tmp_path: Path) -> None:
    spoil(spoilt, lambda tensors: tensors.update({f"{EXPERT}_scale_inv": torch.ones(7, 2)}))
    with pytest.raises(CheckpointError, match=r"\[7, 2\] does not fit"):
        convert(spoilt, tmp_path / "store")


def test_experts_in_different_codecs_are_refused(spoilt: Path, tmp_path: Path) -> None:
    def change(tensors: native.Tensors) -> None:
        del tensors[f"{EXPERT}_scale_inv"]
        tensors[EXPERT] = tensors[EXPERT].to(torch.bfloat16)

    spoil(spoilt, change)
    with pytest.raises(CheckpointError, match=f"layer 1 .* {EXPERT} is not quantised"):
        convert(spoilt, tmp_path / "store")


def test_inputs_ordered_by_activations_are_refused(tmp_path: Path) -> None:
    source = native.tiny("qwen3_moe", tmp_path / "source", moe_intermediate_size=128)
    config = native.compressed("pack-quantized", native.scheme(4, "int", 32))
    quantise = native.integers(4, 32, symmetric=True)
    native.rewrite(source, native.is_projection, quantise, config)
    order = torch.arange(256, dtype=torch.int32)
    spoil(source, lambda tensors: tensors.update({f"{EXPERT}_g_idx": order}))
    with pytest.raises(CheckpointError, match="order of their activations"):
        convert(source, tmp_path / "store")
