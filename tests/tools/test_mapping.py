"""A store holds what transformers itself loads from the same checkpoint, for every family."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoints import FAMILIES, reference, tiny_checkpoint, tiny_composite
from tests.stores import assert_same_weights, state_dict

from tierrun.engine.architecture import build_meta, read_config
from tierrun.io.store import Store
from tierrun.tools.convert import convert

SOME = ("mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "nemotron_h")
"""Separate experts, transposed with biases, expert corrections, fused in files, no gate."""


@pytest.mark.parametrize("family", FAMILIES)
def test_published_layout(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "source")
    convert(source, tmp_path / "store")
    assert_same_weights(Store.open([tmp_path / "store"]), reference(source))


@pytest.mark.parametrize("family", SOME)
def test_fused_layout(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "source", fused=True)
    convert(source, tmp_path / "store")
    assert_same_weights(Store.open([tmp_path / "store"]), reference(source))


@pytest.mark.parametrize("family", SOME)
def test_sharded_bf16(family: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    source = tiny_checkpoint(family, tmp_path / "source", dtype=dtype, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    convert(source, tmp_path / "store")
    assert_same_weights(Store.open([tmp_path / "store"]), reference(source), same_dtypes=False)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("family", SOME)
def test_dtype_casts_as_transformers_does(family: str, dtype: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "source")
    convert(source, tmp_path / "store", dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float16
    assert_same_weights(Store.open([tmp_path / "store"]), reference(source, wanted))


@pytest.mark.parametrize(
    ("family", "text_family"),
    [
        ("qwen3_5_moe", "qwen3_5_moe_text"),
        ("inkling2", "inkling2_text"),
        ("minimax_m3_vl", "minimax_m3_vl_text"),
        ("aria", "aria_text"),
    ],
)
def test_composite_gives_its_text_model(
    family: str, text_family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tiny_composite(family, text_family, tmp_path / "source").state_dict()
    convert(tmp_path / "source", tmp_path / "store")
    model = build_meta(read_config(tmp_path / "source"))
    ours = state_dict(Store.open([tmp_path / "store"]), model)
    for name, tensor in ours.items():
        theirs = whole[
            name if name in whole else name.replace("model.", "model.language_model.", 1)
        ]
        assert torch.equal(tensor, theirs), name
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [text for text in warnings if "not used" in text]


def test_unused_tensors_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source")
    file = source / "model.safetensors"
    save_file(load_file(file) | {"surprise.weight": torch.ones(2)}, file, {"format": "pt"})
    convert(source, tmp_path / "store")
    assert "surprise.weight" in caplog.text
    assert_same_weights(Store.open([tmp_path / "store"]), reference(source))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe", tmp_path / "source", tie_word_embeddings=True)
    manifest = convert(source, tmp_path / "store")
    assert "lm_head.weight" not in {resident.name for resident in manifest.residents}
    assert_same_weights(Store.open([tmp_path / "store"]), reference(source))


def test_mixed_dtypes_of_experts_widen(tmp_path: Path) -> None:
    """Experts of one layer share a record layout, so one wide expert widens its layer."""
    source = tiny_checkpoint("mixtral", tmp_path / "source", dtype=torch.bfloat16)
    file = source / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "experts.3." in name)
    save_file(tensors | {name: tensors[name].float()}, file, {"format": "pt"})
    manifest = convert(source, tmp_path / "store")
    assert len(manifest.classes) == 2
    ours = state_dict(Store.open([tmp_path / "store"]), reference(source))
    theirs = reference(source, torch.float32).state_dict()
    assert all(torch.equal(tensor.float(), theirs[key]) for key, tensor in ours.items())
