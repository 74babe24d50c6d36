"""What quantised checkpoints lack, or have wrong, is named."""

import json
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


def test_zero_points_of_another_shape_are_named(tmp_path: Path) -> None:
    source = native.tiny("qwen3_moe", tmp_path / "source", moe_intermediate_size=128)
    config = native.compressed("pack-quantized", native.scheme(4, "int", 32, symmetric=False))
    quantise = native.integers(4, 32, symmetric=False)
    native.rewrite(source, native.is_projection, quantise, config)
    wrong = torch.zeros(3, 8, dtype=torch.int32)
    spoil(source, lambda tensors: tensors.update({f"{EXPERT}_zero_point": wrong}))
    with pytest.raises(CheckpointError, match=r"zero_point of shape \[3, 8\] does not fit"):
        convert(source, tmp_path / "store")


@pytest.mark.parametrize(
    "part, tensor",
    [
        ("", torch.zeros(5, dtype=torch.float8_e4m3fn)),
        ("", torch.zeros(2, 3, 4, 5, dtype=torch.float8_e4m3fn)),
        ("", torch.zeros(0, 4, dtype=torch.float8_e4m3fn)),
        ("", torch.zeros(4, 4, dtype=torch.float8_e5m2)),
        ("_scale_inv", torch.zeros(2, 2, dtype=torch.int64)),
        ("_scale_inv", torch.zeros(0, 2)),
        ("_scale_inv", torch.zeros(2, 2, 2)),
        ("_packed", torch.zeros(4, dtype=torch.int32)),
        ("_packed", torch.zeros(4, 4, dtype=torch.uint8)),
    ],
)
def test_tensors_that_make_no_sense(
    spoilt: Path, tmp_path: Path, part: str, tensor: torch.Tensor
) -> None:
    spoil(spoilt, lambda tensors: tensors.update({EXPERT + part: tensor}))
    with pytest.raises(CheckpointError) as caught:
        convert(spoilt, tmp_path / "store")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("odd", [[0, 0], [-1, 128], ["a", "b"], 7, [128]])
def test_blocks_that_make_no_sense(spoilt: Path, tmp_path: Path, odd: object) -> None:
    path = spoilt / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weight_block_size"] = odd
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        convert(spoilt, tmp_path / "store")
