"""Quantising leaves less error than plain rounding, never more, whatever the numbers."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.checkpoints import tiny_checkpoint
from tests.stores import contents

import tierrun
from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.expand import dequantise
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import pack
from tierrun.io.errors import CheckpointError, UsageError
from tierrun.io.store import Store
from tierrun.tools.convert import convert
from tierrun.tools.quantise import CHOICES, quantise

TYPES = {
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
    "mxfp4": GGMLQuantizationType.MXFP4,
}


def ours(name: str, values: torch.Tensor) -> torch.Tensor:
    codec = find_codec(name)
    return dequantise(codec, quantise(codec, values, "test"))


def plainly(name: str, values: torch.Tensor) -> torch.Tensor:
    """By llama.cpp's reference: the scale is that of the largest value."""
    blocks = quantize(values.numpy(), TYPES[name])
    return torch.from_numpy(dequantize(blocks, TYPES[name]).copy())


def errors(made: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (made.double() - values.double()).square().view(-1, 32).sum(1)


def gaussian() -> torch.Tensor:
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02


def heavy() -> torch.Tensor:
    """A few values are far out, as in real weights."""
    generator = torch.Generator().manual_seed(1)
    return gaussian() / torch.rand(64, 512, generator=generator).clamp_min(1e-3)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("draw", [gaussian, heavy])
def test_less_error_than_plain_rounding(name: str, draw: Callable[[], torch.Tensor]) -> None:
    values = draw()
    mine, theirs = errors(ours(name, values), values), errors(plainly(name, values), values)
    assert mine.sum() < 0.99 * theirs.sum()
    assert (mine <= theirs * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", CHOICES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_never_worse_than_plain_rounding(name: str, data: st.DataObject) -> None:
    number = st.floats(-1e4, 1e4, width=32)
    small = st.floats(-1, 1, width=32).map(lambda value: value * 1e-6)
    whole = st.sampled_from([0.0, 1.0, -1.0, 7.0, -8.0])
    group = data.draw(st.lists(st.one_of(number, small, whole), min_size=32, max_size=32))
    values = torch.from_numpy(np.array([group], dtype=np.float32))
    mine, theirs = errors(ours(name, values), values), errors(plainly(name, values), values)
    assert mine.isfinite().all()
    assert mine <= theirs * (1 + 1e-4) + 1e-30


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-12, 1e-7, 1e7, 1e30])
def test_groups_of_any_size(name: str, size: float) -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * size
    made = ours(name, values)
    assert made.isfinite().all()
    assert (made.abs() <= 1.5 * values.abs().max() + 1e-30).all()


@pytest.mark.parametrize("name", CHOICES)
def test_what_a_codec_can_hold_is_held_exactly(name: str) -> None:
    codec = find_codec(name)
    if codec.book:
        values = codec.numbers().repeat(4).view(2, 32) * torch.tensor([[0.25], [64.0]])
    else:
        values = (torch.arange(32) % 15 - 7).repeat(2, 1) * torch.tensor([[0.25], [-2.0]])
        values[:, 0] = torch.tensor([-8 * 0.25, -8 * -2.0])
    assert name == "q8_0" or torch.equal(ours(name, values), values)
    assert (ours(name, values) - values).abs().max() <= values.abs().max() / 250


@pytest.mark.parametrize("name", CHOICES)
def test_the_same_with_any_number_of_threads(name: str) -> None:
    codec, values = find_codec(name), heavy().repeat(9, 2)
    threads, made = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        made.append(quantise(codec, values, "test"))
    torch.set_num_threads(threads)
    alone = quantise(codec, values[100:101], "test")
    assert torch.equal(made[0].codes, made[1].codes)
    assert torch.equal(made[0].scale[0], made[1].scale[0])
    assert torch.equal(made[0].codes[100:101], alone.codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(bad: float, copy: Path, tmp_path: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.experts.6.w2.weight"][3, 5] = bad
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1.*down_proj, expert 6: row 3 .* NaN or"):
        convert(copy, tmp_path / "store", quant="q4_0")


def codecs(store: Path) -> tuple[dict[str, str], dict[str, str]]:
    manifest = Store.open([store]).manifest
    matrices = {m.name: m.codec for c in manifest.classes for m in c.matrices}
    return matrices, {r.name: r.dtype for r in manifest.residents}


def test_experts_and_residents_are_chosen_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_checkpoint("qwen2_moe", tmp_path / "source", dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO):
        convert(source, tmp_path / "store", quant="q4_0", quant_resident="q8_0")
    matrices, residents = codecs(tmp_path / "store")
    assert set(matrices.values()) == {"q4_0"}
    quantised = {name for name, dtype in residents.items() if dtype == "q8_0"}
    assert {
        name for name in residents if name.endswith(("_proj.weight", "embed_tokens.weight"))
    } | {"lm_head.weight"} == quantised
    (line,) = [r.getMessage() for r in caplog.records if "rms" in r.getMessage()]
    assert re.search(r"experts \d\.\d % \(q4_0\), resident weights 0\.\d+ % \(q8_0\)$", line)
    with tierrun.load(tmp_path / "store", ram="64MiB") as engine:
        assert engine.logits([5, 6, 7]).isfinite().all()


@pytest.mark.parametrize("name", CHOICES)
def test_a_last_group_may_be_shorter(name: str, tmp_path: Path) -> None:
    values, codec = gaussian()[:40, :80], find_codec(name)
    padded = torch.nn.functional.pad(values, (0, 16))
    got = dequantise(codec, quantise(codec, values, ""))
    wanted = quantise(codec, padded, "")
    assert torch.equal(got, dequantise(codec, wanted)[:, :80])
    packed = Packed.over(pack(codec, quantise(codec, values, "")), codec, (40, 80))
    assert torch.equal(packed.dense(), got)
    source = tiny_checkpoint("mixtral", tmp_path / "source", intermediate_size=80)
    convert(source, tmp_path / "store", quant=name)
    assert codecs(tmp_path / "store")[0] == {"gate_up_proj": name, "down_proj": name}
    with tierrun.load(tmp_path / "store", ram="64MiB") as engine:
        assert engine.logits([5, 6, 7]).isfinite().all()


def test_routers_stay(tmp_path: Path) -> None:
    """Also where they are linear modules, one or several."""
    for family in ("minimax_m2", "zaya", "qwen2_moe"):
        source = tiny_checkpoint(family, tmp_path / family)
        convert(source, tmp_path / f"{family}-store", quant_resident="q4_0")
        residents = codecs(tmp_path / f"{family}-store")[1]
        routers = {
            name for name in residents if re.search(r"\.(gate|router|\w*expert_gate)\.", name)
        }
        assert routers and {residents[name] for name in routers} <= {"F32"}
        assert "q4_0" in residents.values()


def test_resuming_with_another_codec_is_refused(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    store = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        convert(source, store, quant="q8_0", progress=stop)
    for other in ("q4_0", None):
        with pytest.raises(UsageError, match="something else"):
            convert(source, store, quant=other)
    convert(source, store, quant="q8_0")
    convert(source, tmp_path / "whole", quant="q8_0")
    assert contents(store) == contents(tmp_path / "whole")
    assert json.loads((store / "store.json").read_text())["record_classes"]
    with pytest.raises(UsageError, match="already holds a store"):
        convert(source, store, quant="mxfp4")


def test_unknown_codecs(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--quant q4_k: choose q8_0, q4_0 or mxfp4"):
        convert(source, tmp_path / "store", quant="q4_k")
    with pytest.raises(UsageError, match="--quant-resident nf4"):
        convert(source, tmp_path / "store", quant_resident="nf4")
