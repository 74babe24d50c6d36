"""The store written directly: that everything accepts it, what its weights are, and its skew."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from tests.codecs import NAMES
from tests.stores import contents, read_tensors
from typer.testing import CliRunner

from tierrun.bench import random_weights, store_plan, synthetic_store
from tierrun.bench.checkpoint import Shape
from tierrun.bench.stream import token_stream
from tierrun.bench.synthetic import PERCENTS, skew
from tierrun.bench.synthetic_store import SHAPES, Like, build_store
from tierrun.engine.architecture import read_config
from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.weight import matrix_view, widened
from tierrun.engine.engine import load
from tierrun.io.errors import DiskFullError, StoreError, UsageError
from tierrun.io.store import ExpertKey, Store, record_name
from tierrun.tools.verify import verify


@pytest.mark.parametrize("codec", NAMES)
def test_values_are_sane_in_every_codec(codec: str) -> None:
    data = random_weights.matrix_bytes(codec, (72, 512), random_weights.generator(1))
    assert data.numel() == random_weights.matrix_nbytes(codec, (72, 512))
    values = Packed.over(data, find_codec(codec), (72, 512)).dense()
    assert values.isfinite().all()
    assert 0.015 < values.std() < 0.03
    assert values.mean().abs() < 0.005
    assert not torch.equal(values[0], values[1])


def test_scales_differ() -> None:
    data = random_weights.matrix_bytes("q8_0", (32, 1024), random_weights.generator(1))
    scales = Packed.over(data, find_codec("q8_0"), (32, 1024)).whole.planes[1]
    assert len(scales.unique()) > 30
    assert scales.max() / scales.min() < 1.3


@pytest.mark.parametrize("codec", ["q4_k", "q8_0", "mxfp4", "fp8_g128_f32", "bf16"])
def test_the_engine_runs_it(shape: Shape, tmp_path: Path, codec: str) -> None:
    manifest = build_store(tmp_path, shape, codec, codec)
    store = Store.open([tmp_path])
    assert store.manifest == manifest
    assert verify(store).num_records == shape.layers * shape.experts
    assert {m.codec for m in manifest.classes[0].matrices} == {codec}
    with load(tmp_path, device="cpu", vram="0", ram="1MiB") as engine:
        logits = engine.logits(token_stream(16, shape.vocabulary))
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 10


def test_the_recipe(shape: Shape, tmp_path: Path) -> None:
    build_store(tmp_path, shape, "q4_0", "q8_0")
    tensors = read_tensors(Store.open([tmp_path]))
    embedding = tensors["model.embed_tokens.weight"].float()
    assert (embedding[:, 0] == 8).all()
    assert embedding[:, 1:].std().item() == pytest.approx(1.0, abs=0.05)
    router = tensors["model.layers.0.mlp.gate.weight"].float()
    spread = shape.rms / shape.hidden**0.5
    assert router[:, 1:].std().item() == pytest.approx(spread, rel=0.1)
    assert 1.0 < (router[:, 0] * 8 / shape.rms).std() < 4.0
    assert (tensors["model.norm.weight"] == 1).all()
    resident = {r.name: r.dtype for r in Store.open([tmp_path]).manifest.residents}
    assert (
        resident["lm_head.weight"] == resident["model.layers.1.self_attn.o_proj.weight"] == "q8_0"
    )
    assert resident["model.embed_tokens.weight"] == "BF16"


def test_sigma_makes_the_skew(shape: Shape, tmp_path: Path) -> None:
    curves = []
    for sigma in (0.0, shape.sigma):
        build_store(tmp_path, replace(shape, sigma=sigma), "q8_0", "q8_0", force=True)
        curves.append(skew(tmp_path, 64, shape.vocabulary, ram="1MiB"))
    assert curves[1][PERCENTS.index(20.0)] > curves[0][PERCENTS.index(20.0)] + 0.15
    assert curves[1] == sorted(curves[1])


def test_few_records_in_many_places(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic_store, "DISTINCT_RECORDS", 5)
    monkeypatch.setattr(store_plan, "SHARD_BYTES", 64 << 10)
    manifest = build_store(tmp_path, shape, "q4_0")
    records = [record for layer in manifest.layers for record in layer.records]
    assert len({record.checksum for record in records}) == 5
    assert len({(record.shard, record.offset) for record in records}) == 32
    assert len(manifest.shards) > 3
    tensors, store = read_tensors(Store.open([tmp_path])), Store.open([tmp_path])
    verify(store)
    values = [
        widened(matrix_view(tensors[record_name(ExpertKey(0, e))], manifest.classes[0].matrices[1]))
        for e in (0, 1, 5)
    ]
    assert torch.equal(values[0], values[2]) and not torch.equal(values[0], values[1])


def test_the_same_seed_gives_the_same_bytes(shape: Shape, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_store(tmp_path / name, shape, "q4_k", "bf16", seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_a_store_is_replaced_on_request_only(shape: Shape, tmp_path: Path) -> None:
    build_store(tmp_path, shape)
    with pytest.raises(UsageError, match="--force"):
        build_store(tmp_path, shape, "q8_0")
    assert build_store(tmp_path, shape, "q8_0", force=True) == Store.open([tmp_path]).manifest


def test_half_a_store_cannot_be_opened(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    build_store(tmp_path, shape)
    monkeypatch.setattr(synthetic_store, "_write_experts", full)
    with pytest.raises(DiskFullError, match="needs .* free"):
        build_store(tmp_path, shape, force=True)
    with pytest.raises(StoreError, match="not a store"):
        Store.open([tmp_path])


def test_what_cannot_be_is_said(shape: Shape, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError):
        build_store(tmp_path, replace(shape, layers=100, intermediate=1 << 20, hidden=1 << 14))
    with pytest.raises(UsageError, match="multiples of 32"):
        build_store(tmp_path, replace(shape, hidden=80))
    with pytest.raises(StoreError, match="q9_9"):
        build_store(tmp_path, shape, "q9_9")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(("like", "nbytes"), [(Like.QWEN3_6_35B, 18.6), (Like.QWEN3_30B, 16.8)])
def test_presets_are_as_large_as_their_models(like: Like, nbytes: float) -> None:
    shape = SHAPES[like]
    codes = 3 * prod((shape.layers, shape.experts, shape.hidden, shape.intermediate))
    assert codes * 4.625 / 8 / 1e9 == pytest.approx(nbytes, rel=0.01)


def test_the_command(tmp_path: Path) -> None:
    app = synthetic_store.typer.Typer()
    app.command()(synthetic_store.main)
    sizes = "--layers 1 --experts 4 --top-k 2 --hidden 64 --intermediate 32 --vocabulary 64"
    arguments = [str(tmp_path), *sizes.split(), "--sigma", "0.5", "--codec", "q8_0"]
    result = CliRunner().invoke(app, [*arguments, "--tokens", "8"])
    assert result.exit_code == 0, result.output
    assert "4 experts" in result.output and "share of activations" in result.output
    config = read_config(tmp_path / "model")
    assert (config.num_experts, config.max_position_embeddings) == (4, 40960)
