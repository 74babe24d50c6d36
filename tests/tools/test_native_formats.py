"""Published formats of quantised weights run as transformers' own dequantised forward."""

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import native
from tests.checkpoints import quiet
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)

import tierrun
from tierrun.engine.codecs.codec import is_codec
from tierrun.io.store import Manifest, read_manifest
from tierrun.tools.convert import convert

TOKENS = list(range(3, 43))


def ours(source: Path, store: Path) -> torch.Tensor:
    convert(source, store)
    with tierrun.load(store, vram="0", ram="64MiB", exact=True) as engine:
        return engine.logits(TOKENS)


def theirs(source: Path, config: Any = None) -> torch.Tensor:
    with quiet(), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, quantization_config=config
        )
        return model(torch.tensor([TOKENS])).logits[0]


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.abs().max() > 0.5
    assert (got - wanted).abs().max() < 1e-4


def codecs(manifest: Manifest) -> tuple[set[str], set[str]]:
    """Of the matrices of the records, and of the resident weights."""
    matrices = {m.codec for c in manifest.classes for m in c.matrices if len(m.shape) == 2}
    return matrices, {r.dtype for r in manifest.residents if is_codec(r.dtype)}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "minimax_m2", "glm4_moe"])
def test_fp8_in_blocks(family: str, tmp_path: Path) -> None:
    source = native.tiny(family, tmp_path / "source", moe_intermediate_size=256)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}

    def chosen(name: str) -> bool:
        return native.is_projection(name) or (".experts." in name and name.endswith("weight"))

    native.rewrite(source, chosen, native.fp8((128, 128)), config)
    got = ours(source, tmp_path / "store")
    assert_same(got, theirs(source, FineGrainedFP8Config(dequantize=True)))
    manifest = read_manifest(tmp_path / "store")
    experts, residents = codecs(manifest)
    assert experts <= {"fp8_g128_f32", "fp8_row_f32"} and "fp8_g128_f32" in experts
    assert residents <= experts | {"fp8_row_f32"}


def test_fp8_of_fused_experts(tmp_path: Path) -> None:
    """As transformers itself saves them; also with a scale for each expert alone."""
    source = native.tiny("qwen3_moe", tmp_path / "source", moe_intermediate_size=256)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with quiet():
        model.save_pretrained(source, save_original_format=False)

    def quantise(name: str, weight: torch.Tensor) -> native.Tensors:
        parts = [native.fp8((128, 128))("", one) for one in weight]
        if name.endswith("down_proj"):
            parts = [native.fp8(tuple(one.shape))("", one) for one in weight]
        stacked = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        return {name + key: tensor for key, tensor in stacked.items()}

    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    native.rewrite(source, lambda name: ".experts." in name, quantise, config)
    got = ours(source, tmp_path / "store")
    manifest = read_manifest(tmp_path / "store")
    assert codecs(manifest)[0] == {"fp8_g128_f32", "fp8_row_f32"}
    tensors = load_file(source / "model.safetensors")
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            spread = [
                native.blockwise(scale, one.shape, (128, 128) if scale.numel() > 1 else one.shape)
                for scale, one in zip(tensors[name], tensors[weight], strict=True)
            ]
            model.get_parameter(weight).copy_(tensors[weight].float() * torch.stack(spread))
        wanted = model(torch.tensor([TOKENS])).logits[0]
    assert_same(got, wanted)


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    source = native.tiny("gpt_oss", tmp_path / "source", intermediate_size=128)
    experts = ("experts.gate_up_proj", "experts.down_proj")
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    native.rewrite(source, lambda name: name.endswith(experts), native.gpt_oss, config)
    got = ours(source, tmp_path / "store")
    assert_same(got, theirs(source, Mxfp4Config(dequantize=True)))
    assert codecs(read_manifest(tmp_path / "store")) == ({"mxfp4"}, set())


def test_fp4_experts_and_fp8_of_deepseek_v4(tmp_path: Path) -> None:
    source = native.tiny("deepseek_v4", tmp_path / "source", moe_intermediate_size=256)

    def chosen(name: str) -> bool:
        return name.endswith(("wq_a.weight", "wq_b.weight", "wkv.weight", "wo_b.weight")) or (
            ".ffn." in name and name.endswith(("w1.weight", "w2.weight", "w3.weight"))
        )

    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    native.rewrite(source, chosen, native.deepseek_v4, config)
    got = ours(source, tmp_path / "store")
    assert_same(got, theirs(source, FineGrainedFP8Config(dequantize=True)))
    experts, residents = codecs(read_manifest(tmp_path / "store"))
    assert experts == {"mxfp4"} and residents <= {"fp8_g128_e8m0", "fp8_row_e8m0"} and residents


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, None)])
def test_integers_of_compressed_tensors(bits: int, group: int | None, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = native.tiny("qwen3_moe", tmp_path / "source", moe_intermediate_size=256, head_dim=64)
    config = native.compressed("pack-quantized", native.scheme(bits, "int", group))
    quantise = native.integers(bits, group, symmetric=True)
    native.rewrite(source, native.is_projection, quantise, config)
    got = ours(source, tmp_path / "store")
    assert_same(got, theirs(source, CompressedTensorsConfig(**config, dequantize=True)))
    name = f"int{bits}_{f'g{group}' if group else 'row'}_f32"
    assert codecs(read_manifest(tmp_path / "store")) == ({name}, {name})


def test_fp8_of_compressed_tensors(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = native.tiny("qwen3_moe", tmp_path / "source", moe_intermediate_size=128)
    config = native.compressed("float-quantized", native.scheme(8, "float", None))
    native.rewrite(source, native.is_projection, native.fp8((1, 1 << 20), "_scale"), config)
    got = ours(source, tmp_path / "store")
    assert_same(got, theirs(source, CompressedTensorsConfig(**config, dequantize=True)))
    assert codecs(read_manifest(tmp_path / "store")) == ({"fp8_row_f32"}, {"fp8_row_f32"})


def decompressed(source: Path, target: Path, config: dict[str, Any]) -> Path:
    """The checkpoint as compressed-tensors itself expands its weights.

    transformers 5.23 cannot: for experts it passes over zero points and global scales.
    """
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    group = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])

    def restore(parts: native.Tensors) -> torch.Tensor:
        named = {f"weight{suffix}": tensor for suffix, tensor in parts.items()}
        made: torch.Tensor = compressor.decompress(named, group)["weight"].float()
        return made

    return native.dequantised(source, target, restore)


def test_integers_with_zero_points(tmp_path: Path) -> None:
    source = native.tiny("qwen3_moe", tmp_path / "source", moe_intermediate_size=128)
    config = native.compressed("pack-quantized", native.scheme(4, "int", 64, symmetric=False))
    quantise = native.integers(4, 64, symmetric=False)
    native.rewrite(source, native.is_projection, quantise, config)
    got = ours(source, tmp_path / "store")
    assert_same(got, theirs(decompressed(source, tmp_path / "plain", config)))
    assert codecs(read_manifest(tmp_path / "store")) == ({"int4z_g64_f32"}, {"int4z_g64_f32"})


def test_nvfp4_of_compressed_tensors(tmp_path: Path) -> None:
    source = native.tiny("qwen3_moe", tmp_path / "source", moe_intermediate_size=128)
    group = native.scheme(4, "float", 16)
    group["weights"]["strategy"] = "tensor_group"
    config = native.compressed("nvfp4-pack-quantized", group)
    native.rewrite(source, native.is_projection, partial(native.nvfp4, packed=True), config)
    got = ours(source, tmp_path / "store")
    assert_same(got, theirs(decompressed(source, tmp_path / "plain", config)))
    assert codecs(read_manifest(tmp_path / "store")) == ({"nvfp4_div"}, {"nvfp4_div"})


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    """transformers 5.23 cannot load this; the formula stands for it."""
    source = native.tiny("qwen3_moe", tmp_path / "source", moe_intermediate_size=128)
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    native.rewrite(source, native.is_projection, partial(native.nvfp4, packed=False), config)
    plain = native.dequantised(source, tmp_path / "plain", native.restored_nvfp4)
    got = ours(source, tmp_path / "store")
    assert_same(got, theirs(plain))
    assert codecs(read_manifest(tmp_path / "store")) == ({"nvfp4"}, {"nvfp4"})
    move_config(source)
    convert(source, tmp_path / "again")
    assert codecs(read_manifest(tmp_path / "again")) == ({"nvfp4"}, {"nvfp4"})


def move_config(source: Path) -> None:
    """From config.json to ModelOpt's own file."""
    config = json.loads((source / "config.json").read_text())
    inside = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": inside["quant_algo"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(own))


def test_ragged_blocks(tmp_path: Path) -> None:
    """transformers 5.23 refuses them; the formula stands for it."""

    def restore(parts: native.Tensors) -> torch.Tensor:
        codes = parts[""].float()
        return codes * native.blockwise(parts["_scale_inv"], codes.shape, (128, 128))

    source = native.ragged(tmp_path / "source")
    plain = native.dequantised(source, tmp_path / "plain", restore, "_scale_inv")
    assert_same(ours(source, tmp_path / "store"), theirs(plain))
