"""What cannot be converted is refused with one clear line, and nothing is left behind."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.checkpoints import tiny_checkpoint

from tierrun.io.errors import CheckpointError, ModelError, StoreError, TierrunError, UsageError
from tierrun.tools.convert import convert


def refused(source: Path | str, target: Path, kind: type[TierrunError], *words: str) -> None:
    """`source` is refused with one line that has `words`, and nothing is left behind."""
    with pytest.raises(kind) as caught:
        convert(source, target)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert not target.exists()


def test_no_such_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "s", CheckpointError, "no such directory")


def test_no_config(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").unlink()
    refused(copy, tmp_path / "s", CheckpointError, "config.json")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "c", max_shard_size="300KB")
    victim = sorted(source.glob("*.safetensors"))[1]
    victim.unlink()
    refused(source, tmp_path / "s", CheckpointError, victim.name)
    (source / "model.safetensors.index.json").unlink()
    refused(source, tmp_path / "s", CheckpointError, victim.name)


def without(source: Path, part: str) -> str:
    """Take the first tensor with `part` in its name out of the checkpoint."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if part in name)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["experts.0.w1", "experts.5.w2", "experts.7.w3"])
def test_missing_expert_is_named(copy: Path, tmp_path: Path, part: str) -> None:
    name = without(copy, part)
    layer = name.split(".")[2]
    expert = part.split(".")[1]
    refused(copy, tmp_path / "s", CheckpointError, f"layer {layer} ", f"expert {expert}:", name)


def test_missing_layer_is_named(tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "c", fused=True)
    name = without(source, "layers.1.mlp.experts.gate_up_proj")
    refused(source, tmp_path / "s", CheckpointError, "layer 1", name)


def test_missing_resident_is_named(copy: Path, tmp_path: Path) -> None:
    name = without(copy, "self_attn.k_proj")
    refused(copy, tmp_path / "s", CheckpointError, name)


def test_wrong_shapes_are_named(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    refused(copy, tmp_path / "s", CheckpointError, "[256, 64]", "[300, 64]")
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    refused(copy, tmp_path / "s", CheckpointError, "layers.0", "expert 0", "[1, 96, 64]")
    (copy / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    refused(copy, tmp_path / "s", CheckpointError, "layer 0", "8 tensors")


def test_truncated_source(copy: Path, tmp_path: Path) -> None:
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    refused(copy, tmp_path / "s", StoreError, "truncated")


def test_dense_model(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tmp_path / "c")
    refused(source, tmp_path / "s", CheckpointError, "dense")


def test_unrouted_experts(copy: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint("jetmoe", tmp_path / "c")
    refused(source, tmp_path / "s", ModelError, "jetmoe")


def test_unknown_architecture(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "nonesuch"}')
    refused(copy, tmp_path / "s", ModelError, "nonesuch")


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "quark"])
def test_quantised_in_a_way_without_a_codec(copy: Path, tmp_path: Path, method: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, tmp_path / "s", CheckpointError, "quantised", method)


def test_weights_of_other_kinds(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, tmp_path / "s", CheckpointError, "*.bin", "save_pretrained")
    (copy / "pytorch_model.bin").unlink()
    refused(copy, tmp_path / "s", CheckpointError, "no *.safetensors")


def test_hub_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing-of-this-name", tmp_path / "s", CheckpointError, "nobody/nothing")


def test_unwritable_directory(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        convert(source, tmp_path / "file" / "store")
    with pytest.raises(UsageError, match="cannot be written"):
        convert(source, "/proc/tierrun")


def test_odd_requests(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype int3"):
        convert(source, tmp_path / "store", dtype="int3")
    with pytest.raises(UsageError, match="named twice"):
        convert(source, [tmp_path, tmp_path])
    with pytest.raises(UsageError, match="no directory"):
        convert(source, [])
