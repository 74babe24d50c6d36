"""The store written directly: that everything accepts it, what its weights are, and its skew."""

import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.bench.conftest import Run, refused
from tests.codecs import NAMES
from tests.stores import contents, read_tensors

from tierrun.bench import random_weights, store_plan, synthetic_store
from tierrun.bench.checkpoint import Shape
from tierrun.bench.stream import routing_of, token_stream
from tierrun.bench.synthetic import PERCENTS, skew
from tierrun.bench.synthetic_models import MODELS, Asked, Routing, find_model
from tierrun.bench.synthetic_store import build_store
from tierrun.engine.architecture import read_config
from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.weight import matrix_view, widened
from tierrun.engine.engine import load
from tierrun.io.errors import DiskFullError, StoreError, UsageError
from tierrun.io.store import ExpertKey, Store, record_name
from tierrun.tiers.usage import top_shares
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


# GB of experts at 4.5 bits: what the models' own configurations give (MXFP4: 4.25).
SIZES = {
    "qwen3-30b-a3b": 16.3,
    "qwen3.6-35b-a3b": 18.1,
    "qwen3.8-flash-next": 67.9,
    "gpt-oss-20b": 10.7,
    "gpt-oss-120b": 64.5,
    "gemma-4-26b-a4b": 12.8,
    "glm-5": 407.7,
    "deepseek-v4-flash": 155.8,
    "deepseek-v4-pro": 870.4,
    "minimax-m2": 126.4,
    "step-3.5-flash": 107.0,
}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"small"}))
def test_models_are_as_large_as_they_are(name: str) -> None:
    shape = MODELS[name].shape
    weights = 3 * prod((shape.layers, shape.experts, shape.hidden, shape.intermediate))
    assert weights * 4.5 / 8 / 1e9 == pytest.approx(SIZES[name], rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_planned(name: str) -> None:
    shape, codec = MODELS[name]
    plan = store_plan.plan_store(replace(shape, layers=1), codec, "q4_k")
    assert plan.record.nbytes % 4096 == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_top_fifth_of_the_experts_takes_most(name: str) -> None:
    """Scores are N(0, 1) + sigma · N(0, 1): what the recipe makes of a router."""
    shape, random = MODELS[name].shape, np.random.default_rng(0)
    shares = []
    for _ in range(16):
        popularity = random.normal(0.0, shape.sigma, shape.experts)
        scores = random.normal(0.0, 1.0, (500, shape.experts)) + popularity
        chosen = np.argpartition(-scores, shape.top_k)[:, : shape.top_k]
        shares += top_shares(np.bincount(chosen.ravel(), minlength=shape.experts), (20.0,))
    assert 0.77 < np.mean(shares) < 0.9


def test_names_may_be_cut_short() -> None:
    assert find_model("qwen3.6-35b") == ("qwen3.6-35b-a3b", MODELS["qwen3.6-35b-a3b"])
    assert find_model("GLM")[0] == "glm-5"
    with pytest.raises(UsageError, match="several begin so.*gpt-oss-20b, gpt-oss-120b$"):
        find_model("gpt-oss")
    with pytest.raises(UsageError, match="not known; choose from small, .*minimax-m2"):
        find_model("llama")


def test_what_was_asked_for_replaces_the_models() -> None:
    name, shape, codec = Asked("gpt-oss-120b", layers=3, experts=8).resolve(Routing.LOCAL)
    assert (name, codec) == ("gpt-oss-120b", "mxfp4")
    assert shape == replace(MODELS[name].shape, layers=3, experts=8, sigma=0.0)
    assert Asked("small", sigma=1.0).resolve(Routing.UNIFORM)[1].sigma == 1.0
    with pytest.raises(UsageError, match="there are 2 experts"):
        Asked("small", experts=2).resolve(Routing.SEED)


def lru_hits(stream: list[int], capacity: int) -> float:
    """Of tokens that each want experts of their own, one an expert."""
    held, hits = list[int](), 0
    for token in stream:
        hits += token in held
        held = [token, *(other for other in held if other != token)][:capacity]
    return hits / len(stream)


def test_streams_differ_in_skew_and_locality() -> None:
    """Of 512 tokens, 64 held: what was lately used is used again, or is not."""
    streams = {r: token_stream(1200, 512, routing=r) for r in Routing}
    hits = {r: lru_hits(stream, 64) for r, stream in streams.items()}
    assert hits[Routing.UNIFORM] == pytest.approx(64 / 512, abs=0.04)
    assert min(hits[Routing.SEED], hits[Routing.LOCAL]) > 0.5
    for routing, stream in streams.items():
        assert stream == token_stream(1300, 512, routing=routing)[:1200]
    commonest = {r: np.bincount(s, minlength=512).max() / 1200 for r, s in streams.items()}
    assert commonest[Routing.UNIFORM] < 0.02


def test_uniform_routing_is_flat(shape: Shape, tmp_path: Path) -> None:
    for routing in (Routing.SEED, Routing.UNIFORM):
        sigma = shape.sigma if routing is Routing.SEED else 0.0
        build_store(
            tmp_path / routing, replace(shape, sigma=sigma), "q8_0", "q8_0", routing=routing
        )
    at = PERCENTS.index(20.0)
    seed, uniform = (
        skew(tmp_path / routing, 256, shape.vocabulary, ram="1MiB")[at]
        for routing in (Routing.SEED, Routing.UNIFORM)
    )
    assert uniform < 0.4 < seed - 0.1


SMALL = (
    *("--layers", 1, "--experts", 4, "--top-k", 2, "--hidden", 64, "--intermediate", 32),
    *("--vocabulary", 64),
)


def test_the_command(run: Run, tmp_path: Path) -> None:
    rest = ("--sigma", 0.5, "--codec", "q8_0", "--routing", "local", "--tokens", 8)
    code, printed, error = run("store", tmp_path, "--like", "qwen3-30b", *SMALL, *rest)
    assert code == 0, error
    assert "like qwen3-30b-a3b, routing local, 4 experts in q8_0" in " ".join(printed.split())
    assert "share of activations" in printed
    config = read_config(tmp_path / "model")
    assert (config.num_experts, config.max_position_embeddings) == (4, 40960)
    assert routing_of(config) is Routing.LOCAL
    assert Store.open([tmp_path]).manifest.model_id == "qwen3-30b-a3b"
    code, printed, _ = run("store", tmp_path / "none", "--like", "list")
    assert code == 0 and all(name in printed for name in MODELS)
    assert not (tmp_path / "none").exists()


def test_the_script_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tierrun.bench.synthetic_store", str(tmp_path / "store")]
    ours = [*command, "--like", "qwen3.6-35b", *map(str, SMALL)]
    done = subprocess.run(ours, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "like qwen3.6-35b-a3b" in done.stdout
    done = subprocess.run(ours, text=True, capture_output=True)
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "--force" in done.stderr


def test_refusals_are_one_line(run: Run, tmp_path: Path) -> None:
    there = tmp_path / "store"
    assert "choose from small" in refused(run, "store", there, "--like", "foo")
    assert "uniform, seed, local" in refused(run, "store", there, "--routing", "foo")
    assert "q9_9" in refused(run, "store", there, *SMALL, "--codec", "q9_9")
    assert "as GGUF there are" in refused(run, "store", there, *SMALL, "--codec", "q6_k", "--peers")
    assert "multiple of its 256" in refused(
        run, "store", there, *SMALL, "--codec", "q4_k", "--peers"
    )
    assert not there.exists()
