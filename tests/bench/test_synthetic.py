"""The synthetic checkpoint: what it holds, that the store computes the same, and its skew."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from tierrun.bench.checkpoint import Shape, build_checkpoint
from tierrun.bench.stream import routing_of, token_stream
from tierrun.bench.synthetic import PERCENTS, PeerFiles, build_for_peers, skew
from tierrun.bench.synthetic_gguf import CODECS, gguf_nbytes, write_gguf
from tierrun.bench.synthetic_models import Routing
from tierrun.engine.architecture import read_config
from tierrun.engine.codecs.weight import matrix_view, widened
from tierrun.engine.engine import load
from tierrun.io.errors import DiskFullError, UsageError
from tierrun.io.store import ExpertKey, Store
from tierrun.tools.convert import convert
from tierrun.tools.verify import verify


def test_transformers_and_the_store_agree(synthetic: Path) -> None:
    tokens = token_stream(12, 512)
    model = AutoModelForCausalLM.from_pretrained(synthetic / "checkpoint", dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens])).logits[0]
    with load(synthetic / "store", ram="1MiB") as engine:
        ours = engine.logits(tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_recipe(synthetic: Path, shape: Shape) -> None:
    model = AutoModelForCausalLM.from_pretrained(synthetic / "checkpoint", dtype=torch.float32)
    embedding = model.model.embed_tokens.weight
    assert (embedding[:, 0] == 8).all()
    assert embedding[:, 1:].std().item() == pytest.approx(1.0, abs=0.05)
    router = model.model.layers[0].mlp.gate.weight
    spread = shape.rms / math.sqrt(shape.hidden)
    assert router[:, 1:].std().item() == pytest.approx(spread, rel=0.1)
    popularity = router[:, 0] * 8 / shape.rms
    assert 1.0 < popularity.std().item() < 4.0
    assert (model.model.norm.weight == 1).all()
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_no_two_experts_are_equal(synthetic: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(synthetic / "checkpoint", dtype=torch.float32)
    rows = model.model.layers[1].mlp.experts.down_proj.flatten(1)
    assert len({tuple(row[:8].tolist()) for row in rows}) == len(rows)


def test_sigma_makes_the_skew(synthetic: Path, shape: Shape, tmp_path: Path) -> None:
    skewed = dict(zip(PERCENTS, skew(synthetic / "store", 64, 512, ram="1MiB"), strict=True))
    assert skewed[40.0] > 0.6  # 0.4 where all are equally popular
    assert list(skewed.values()) == sorted(skewed.values())


def test_the_same_seed_gives_the_same_bytes(shape: Shape, tmp_path: Path) -> None:
    small = replace(shape, layers=1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_checkpoint(tmp_path / name, small, seed)
    a, b, c = (next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_disk_without_room_is_said(shape: Shape, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="free, the checkpoint needs"):
        build_checkpoint(tmp_path, replace(shape, layers=1_000, hidden=1 << 20))


def test_the_stream_is_fixed_and_local() -> None:
    stream = token_stream(400, 512, seed=3)
    assert stream == token_stream(500, 512, seed=3)[:400]
    assert stream != token_stream(400, 512, seed=4)
    assert 0 <= min(stream) and max(stream) < 512
    near = len(set(stream[:100]) & set(stream[100:200]))
    far = len(set(stream[:100]) & set(stream[300:]))
    assert near > far


LARGER = Shape(2, 8, 2, 256, 256, heads=4, kv_heads=2, head_dim=64, vocabulary=128)
"""Whose matrices every type of GGML can hold."""


def test_the_same_weights_for_every_engine(tmp_path: Path) -> None:
    """In bf16 the GGUF, read by the converter, gives the checkpoint's logits to the last bit."""
    files = PeerFiles.under(tmp_path)
    build_for_peers(tmp_path, LARGER, "bf16", routing=Routing.LOCAL)
    convert(files.gguf, tmp_path / "converted")
    tokens, logits = token_stream(12, 128), []
    for store in (files.store, tmp_path / "converted"):
        with load(store, ram="4MiB", device="cpu") as engine:
            logits.append(engine.logits(tokens))
    assert torch.equal(*logits)
    assert routing_of(read_config(files.store / "model")) is Routing.LOCAL


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "bf16"])
def test_quantised_weights_are_sane_and_the_same(codec: str, tmp_path: Path) -> None:
    build_for_peers(tmp_path, LARGER, codec)
    store, gguf = Store.open([tmp_path / "store"]), GGUFReader(tmp_path / "model.gguf")
    verify(store)
    assert {m.codec for m in store.manifest.classes[0].matrices} == {codec}
    assert not (tmp_path / "checkpoint").exists()
    (down,) = (t for t in gguf.tensors if t.name == "blk.1.ffn_down_exps.weight")
    theirs = torch.from_numpy(dequantize(down.data, down.tensor_type))
    assert theirs.isfinite().all() and theirs.mean().abs() < 0.005
    assert theirs.std().item() == pytest.approx(0.02, rel=0.3)
    record, extent = store.locate(ExpertKey(1, 3))
    data = store.shard_paths[record.shard].read_bytes()[extent.offset : extent.end]
    matrix = store.manifest.classes[0].matrices[-1]
    ours = widened(matrix_view(torch.frombuffer(bytearray(data), dtype=torch.uint8), matrix))
    assert torch.equal(ours, theirs[3])


def test_nothing_is_left_of_half_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError, match="3 forms of the model need"):
        build_for_peers(tmp_path, replace(LARGER, layers=1000, hidden=1 << 16), "bf16")
    monkeypatch.setattr("tierrun.bench.synthetic.convert", full)
    with pytest.raises(OSError):
        build_for_peers(tmp_path, LARGER, "bf16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_file_takes_is_known_before(codec: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", LARGER, codec)
    tensors = GGUFReader(tmp_path / "model.gguf").tensors
    assert sum(int(tensor.n_bytes) for tensor in tensors) == gguf_nbytes(LARGER, codec)


def test_a_model_is_replaced_on_request_only(tmp_path: Path) -> None:
    build_for_peers(tmp_path, LARGER, "q8_0")
    with pytest.raises(UsageError, match="--force"):
        build_for_peers(tmp_path, LARGER, "q4_0")
    assert build_for_peers(tmp_path, LARGER, "q4_0", force=True).classes[0].matrices[0].codec
