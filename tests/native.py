"""Checkpoints in the formats that models are published in, quantised plainly and by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import quiet
from tests.engine.models import save_runnable

Tensors = dict[str, torch.Tensor]
Quantiser = Callable[[str, torch.Tensor], Tensors]

_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def rewrite(
    directory: Path, chosen: Callable[[str], bool], quantise: Quantiser, config: dict[str, Any]
) -> Path:
    """Quantise the weights `chosen` by name of the checkpoint in `directory`, in place."""
    tensors: Tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        tensors |= quantise(name, tensor) if chosen(name) else {name: tensor}
    made = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(made, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    read = json.loads(path.read_text())
    path.write_text(json.dumps(read | {"quantization_config": config}))
    return directory


def is_projection(name: str) -> bool:
    """Linear weights, experts included; not embeddings, routers and norms."""
    return name.endswith("_proj.weight")


def blockwise(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """`scale` for every element of a matrix of `shape`."""
    height, width = (min(n, most) for n, most in zip(block, shape, strict=True))
    spread = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return spread[: shape[0], : shape[1]]


def largest(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude in each block."""
    height, width = (min(n, most) for n, most in zip(block, weight.shape, strict=True))
    missing = (0, -weight.shape[1] % width, 0, -weight.shape[0] % height)
    padded = torch.nn.functional.pad(weight.abs(), missing)
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).amax((1, 3))


def fp8(block: tuple[int, int], suffix: str = "_scale_inv") -> Quantiser:
    """FP8 with an fp32 scale per block."""

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        scale = largest(weight.float(), block).clamp_min(1e-6) / 448
        codes = weight.float() / blockwise(scale, weight.shape, block)
        return {name: codes.to(torch.float8_e4m3fn), name + suffix: scale}

    return quantise


def fp4_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest FP4 code of each number, two to a byte, the even one low."""
    scaled = weight.float() / scale
    code = (scaled.abs()[..., None] - _FP4).abs().argmin(-1) + 8 * (scaled < 0)
    code = code.to(torch.uint8)
    return code[..., ::2] | code[..., 1::2] << 4


def exponents(weight: torch.Tensor, group: int = 32) -> torch.Tensor:
    """A power of two per group, as a biased byte."""
    top = weight.float().unflatten(-1, (-1, group)).abs().amax(-1).clamp_min(1e-6)
    return (top.log2().floor() - 2 + 127).to(torch.uint8)


def powers(byte: torch.Tensor, group: int = 32) -> torch.Tensor:
    return (byte.float() - 127).exp2().repeat_interleave(group, -1)


def gpt_oss(name: str, weight: torch.Tensor) -> Tensors:
    """Experts [experts, in, out] as blocks and scales [experts, out, in / 32]."""
    rows = weight.transpose(1, 2)
    byte = exponents(rows)
    blocks = fp4_codes(rows, powers(byte)).unflatten(-1, (-1, 16))
    return {f"{name}_blocks": blocks, f"{name}_scales": byte}


def deepseek_v4(name: str, weight: torch.Tensor) -> Tensors:
    """FP4 experts and FP8 for the rest, with exponents as scales."""
    stem = name.removesuffix(".weight")
    if ".experts." in name:
        byte = exponents(weight)
        codes = fp4_codes(weight, powers(byte)).view(torch.int8)
        return {name: codes, f"{stem}.scale": byte.view(torch.float8_e8m0fnu)}
    top = largest(weight.float(), (128, 128)).clamp_min(1e-6)
    byte = (top.log2().floor() - 8 + 127).to(torch.uint8)
    scale = blockwise((byte.float() - 127).exp2(), weight.shape, (128, 128))
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {name: codes, f"{stem}.scale": byte.view(torch.float8_e8m0fnu)}


def nvfp4(name: str, weight: torch.Tensor, *, packed: bool) -> Tensors:
    """ModelOpt's names, whose global scale multiplies, or compressed-tensors', where it divides."""
    top = weight.float().unflatten(-1, (-1, 16)).abs().amax(-1) / 6
    whole = (top.max() / 448).clamp_min(1e-8).log2().ceil().exp2()  # exact in bf16 products
    scale = (top / whole).to(torch.float8_e4m3fn)
    divisor = (1 / whole).reshape(1)
    spread = (scale.float() / divisor if packed else scale.float() * whole).repeat_interleave(16, 1)
    codes = fp4_codes(weight, spread.clamp_min(1e-12))
    if packed:
        return {
            f"{name}_packed": codes, f"{name}_scale": scale, f"{name}_global_scale": divisor,
        }  # fmt: skip
    return {
        name: codes, f"{name}_scale": scale, f"{name}_scale_2": whole,
        f"{name.removesuffix('.weight')}.input_scale": torch.ones(()),
    }  # fmt: skip


def integers(bits: int, group: int | None, *, symmetric: bool) -> Quantiser:
    """compressed-tensors' integers in 32-bit words, with scales that bf16 products round not."""

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        per = group or weight.shape[1]
        parts = weight.float().unflatten(1, (-1, per))
        low, high = parts.amin(-1), parts.amax(-1)
        top = 1 << (bits - 1)
        span = torch.maximum(-low, high) / top if symmetric else (high - low) / (2 * top - 1)
        scale = span.clamp_min(1e-6).log2().ceil().exp2()
        zero = torch.zeros_like(scale) if symmetric else (-low / scale).round() - top
        zero = zero.clamp(-top, top - 1)
        codes = (parts / scale[..., None] + zero[..., None]).round().clamp(-top, top - 1)
        made = {
            f"{name}_packed": words(codes.flatten(1), bits),
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(weight.shape),
        }
        return made if symmetric else made | {f"{name}_zero_point": words(zero.T, bits).T}

    return quantise


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed integers [rows, n], offset and packed from the low bits up, int32."""
    per = 32 // bits
    unsigned = values.to(torch.int64) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -values.shape[1] % per))
    shifts = torch.arange(per) * bits
    word = (unsigned.unflatten(1, (-1, per)) << shifts).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def dequantised(
    directory: Path,
    target: Path,
    restore: Callable[[Tensors], torch.Tensor],
    scale: str = "_scale",
) -> Path:
    """The checkpoint in `directory` without its quantisation, in `target`.

    `restore` makes a weight of the tensors whose names begin with the weight's, by what follows it.
    """
    shutil.copytree(directory, target)
    tensors = load_file(directory / "model.safetensors")
    scales = [name for name in tensors if name.endswith(f".weight{scale}")]
    for name in (name.removesuffix(scale) for name in scales):
        parts = [other for other in tensors if other.startswith(name)]
        tensors[name] = restore({p.removeprefix(name): tensors.pop(p) for p in parts})
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config")
    (target / "config.json").write_text(json.dumps(config))
    return target


def restored_nvfp4(parts: Tensors) -> torch.Tensor:
    """ModelOpt's formula."""
    low, high = parts[""] & 15, parts[""] >> 4
    codes = torch.stack((low, high), -1).flatten(1).long()
    scale = parts["_scale"].float().repeat_interleave(16, 1) * parts["_scale_2"]
    return torch.cat((_FP4, -_FP4))[codes] * scale


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


def scheme(bits: int, kind: str, group: int | None, *, symmetric: bool = True) -> dict[str, Any]:
    """A quantization_config of compressed-tensors for all linear modules but routers."""
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
    }
    return {"targets": ["Linear"], "weights": weights}


def compressed(layout: str, group: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def ragged(directory: Path) -> Path:
    """A tiny Qwen3 in FP8 whose last blocks have 16 rows and 32 inputs."""
    tiny("qwen3_moe", directory, hidden_size=160, moe_intermediate_size=144)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return rewrite(directory, is_projection, fp8((128, 128)), config)
