"""Packed weights come through conversion as they were, bit for bit."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.checkpoints import tiny_checkpoint
from tests.codecs import NAMES, random_fields
from tests.packed import Kinds, PackedCheckpoint
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter

import tierrun
from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.expand import dequantise
from tierrun.engine.codecs.weight import matrix_view, widened
from tierrun.engine.resident import ResidentWeights
from tierrun.io.errors import CheckpointError, UsageError
from tierrun.io.store import ExpertKey, Matrix, Store
from tierrun.tools import convert as conversion
from tierrun.tools.convert import convert
from tierrun.tools.mapping import Assembly, Mapping
from tierrun.tools.widening import holds, widen

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "expert_ffn_hidden_size": 256,
}


def everywhere(codec: str, axis: int | None = None) -> Kinds:
    """All linear, embedding and expert weights in `codec`."""

    def kinds(name: str) -> tuple[str, int] | None:
        if "experts" in name and not name.endswith(("bias", "gate.weight")):
            fused = axis is not None and not name.endswith("weight")
            return codec, axis if fused and axis is not None else 1
        return (codec, 1) if name.endswith(("_proj.weight", "embed_tokens.weight")) else None

    return kinds


def converted(
    monkeypatch: pytest.MonkeyPatch, source: PackedCheckpoint, store: Path, **options: Any
) -> Store:
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "open_source", lambda *_, **__: source)
        convert("packed", store, **options)
    return Store.open([store])


def weights(store: Store) -> dict[str, torch.Tensor]:
    """Everything in fp32; gate and up apart, so that either way of storing them compares."""
    residents, manifest = ResidentWeights(store), store.manifest
    made = {r.name: widened(residents.weight(r.name)) for r in manifest.residents}
    for number, layer in enumerate(manifest.layers):
        for expert in range(len(layer.records)):
            for matrix in manifest.class_of(number).matrices:
                made[f"{number}.{expert}.{matrix.name}"] = read(store, number, expert, matrix)
    return {name: value for name, value in made.items() if not name.endswith(".inputs")}


def read(store: Store, layer: int, expert: int, matrix: Matrix) -> torch.Tensor:
    record, extent = store.locate(ExpertKey(layer, expert))
    data = store.shard_paths[record.shard].read_bytes()[extent.offset : extent.end]
    return widened(matrix_view(torch.frombuffer(bytearray(data), dtype=torch.uint8), matrix))


def assert_kept(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path, kinds: Kinds
) -> tuple[Store, Store]:
    """Packed and told as numbers, the checkpoint becomes stores of the same values."""
    packed = converted(monkeypatch, PackedCheckpoint.open(source, kinds), tmp_path / "packed")
    numbers = PackedCheckpoint.open(source, kinds, as_numbers=True)
    plain = converted(monkeypatch, numbers, tmp_path / "plain")
    ours, theirs = weights(packed), weights(plain)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    return packed, plain


CODECS = ("q8_0", "q4_k", "q6_k", "mxfp4", "nvfp4", "fp8_g128_f32", "int4z_g32_f16", "q3_k")


@pytest.mark.parametrize("codec", CODECS)
def test_every_plane_is_kept(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint("qwen3_moe", tmp_path / "source", **WIDE)
    packed, _ = assert_kept(monkeypatch, source, tmp_path, everywhere(codec))
    assert {m.codec for m in packed.manifest.classes[0].matrices} == {codec}
    kept = {r.name for r in packed.manifest.residents if r.dtype == codec}
    assert "model.layers.1.self_attn.q_proj.weight" in kept
    assert "model.embed_tokens.weight" in kept


@pytest.mark.parametrize(
    "family, fused, axis",
    [
        ("mixtral", False, None),
        ("mixtral", True, 2),
        ("gpt_oss", False, 1),
        ("granitemoe", False, None),
        ("deepseek_v3", False, None),
        ("qwen2_moe", True, 2),
    ],
)
def test_families(
    family: str, fused: bool, axis: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Separate and fused experts, natively transposed ones with biases, shared experts."""
    source = tiny_checkpoint(family, tmp_path / "source", fused=fused, **WIDE)
    kinds = everywhere("q5_1", axis)
    if family == "granitemoe":
        kinds = granite
    packed, _ = assert_kept(monkeypatch, source, tmp_path, kinds)
    matrices = packed.manifest.classes[0].matrices
    assert {m.codec for m in matrices if len(m.shape) == 2} == {"q5_1"}


def granite(name: str) -> tuple[str, int] | None:
    return ("q5_1", 2) if "_linear.weight" in name else None


def test_packed_residents_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source", **WIDE)
    packed, _ = assert_kept(monkeypatch, source, tmp_path, everywhere("nvfp4"))
    for resident in packed.manifest.residents:
        assert resident.extent.offset % (64 if resident.dtype == "nvfp4" else 4) == 0
        with safe_open(packed.shard_paths[resident.shard], "pt") as file:
            assert file.get_slice(resident.name).get_dtype() in ("U8", "F32")


def gate_apart(name: str) -> tuple[str, int] | None:
    """Gate, up and down as llama-quantize's mixes have them, another in the second layer."""
    if ".experts." not in name:
        return None
    up = "q4_0" if "layers.0" in name else "q8_0"
    return ({"w1": "q8_0", "w3": up, "w2": "q6_k"}[name.split(".")[-2]], 1)


def test_gate_and_up_in_different_codecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source", **WIDE)
    kinds = gate_apart
    packed = converted(monkeypatch, PackedCheckpoint.open(source, kinds), tmp_path / "packed")
    first, second = (packed.manifest.class_of(layer).matrices for layer in (0, 1))
    assert [(m.name, m.codec, m.shape) for m in first] == [
        ("gate_proj", "q8_0", (256, 256)),
        ("up_proj", "q4_0", (256, 256)),
        ("down_proj", "q6_k", (256, 256)),
    ]
    assert [(m.name, m.codec) for m in second] == [("gate_up_proj", "q8_0"), ("down_proj", "q6_k")]
    numbers = PackedCheckpoint.open(source, kinds, as_numbers=True)
    plain = converted(monkeypatch, numbers, tmp_path / "plain")
    ours, theirs = weights(packed), weights(plain)
    joined = torch.cat([ours["0.3.gate_proj"], ours["0.3.up_proj"]])
    assert torch.equal(joined, theirs["0.3.gate_up_proj"])
    assert torch.equal(ours["1.3.gate_up_proj"], theirs["1.3.gate_up_proj"])


def test_one_of_gate_and_up_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source", dtype=torch.bfloat16, **WIDE)
    packed = PackedCheckpoint.open(source, lambda n: ("q8_0", 1) if ".w1." in n else None)
    store = converted(monkeypatch, packed, tmp_path / "packed")
    matrices = store.manifest.classes[0].matrices
    assert [(m.name, m.codec) for m in matrices] == [
        ("gate_proj", "q8_0"), ("up_proj", "bf16"), ("down_proj", "bf16"),
    ]  # fmt: skip


def test_experts_of_a_layer_must_be_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source", **WIDE)
    kinds = lambda n: ("q8_0" if ".experts.5." in n else "q4_0", 1) if ".w2." in n else None  # noqa: E731
    with pytest.raises(CheckpointError, match=r"layer 0 .*experts\.5\.w2.* is q8_0, .* q4_0"):
        converted(monkeypatch, PackedCheckpoint.open(source, kinds), tmp_path / "packed")


def test_what_is_not_rows_is_stored_as_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Packed along the output, rows of the source are columns of the model."""
    source = tiny_checkpoint("gpt_oss", tmp_path / "source", **WIDE)
    kinds = everywhere("q8_0", 2)
    with caplog.at_level(logging.WARNING):
        packed, _ = assert_kept(monkeypatch, source, tmp_path, kinds)
    assert {m.codec for m in packed.manifest.classes[0].matrices} == {"f32"}
    (told,) = [r.getMessage() for r in caplog.records if "cannot stay" in r.getMessage()]
    assert told.startswith("32 weights (") and "q8_0" in told  # 2 layers, 8 experts, 2 matrices


def test_quantised_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source", **WIDE)
    packed = PackedCheckpoint.open(source, everywhere("q4_k"))
    with pytest.raises(UsageError, match="--quant q8_0: .* q4_k"):
        converted(monkeypatch, packed, tmp_path / "packed", quant="q8_0")
    some = PackedCheckpoint.open(source, lambda n: ("q4_k", 1) if ".w2." in n else None)
    store = converted(monkeypatch, some, tmp_path / "some", quant="q8_0")
    assert [m.codec for m in store.manifest.classes[0].matrices] == ["q8_0", "q4_k"]


def test_what_has_no_codec_is_requantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source", **WIDE)
    packed = PackedCheckpoint.open(source, lambda n: None)
    packed.lossy = frozenset(name for name in packed.plain.tensors if ".w2." in name)
    with caplog.at_level(logging.WARNING):
        store = converted(monkeypatch, packed, tmp_path / "store", requant="q4_0")
    assert [m.codec for m in store.manifest.classes[0].matrices] == ["f32", "q4_0"]
    (told,) = [r.getMessage() for r in caplog.records if "lossy" in r.getMessage()]
    assert told.startswith("16 weights (") and "q4_0" in told


def test_columns_of_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint("mixtral", tmp_path / "source", head_dim=64, **WIDE)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    permute_columns(monkeypatch, order)
    packed, plain = assert_kept(monkeypatch, source, tmp_path, everywhere("q4_k"))
    (entry,) = [
        r for r in packed.manifest.residents if r.name.endswith("1.self_attn.o_proj.weight")
    ]
    assert entry.dtype == "q4_k" and entry.inputs == f"{entry.name}.inputs"
    assert {r.dtype for r in packed.manifest.residents if r.name == entry.inputs} == {"I32"}
    ids = list(range(3, 30))
    logits = []
    for store in (packed, plain):
        with tierrun.load(store.roots[0], ram="64MiB", exact=True) as engine:
            logits.append(engine.logits(ids))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def permute_columns(monkeypatch: pytest.MonkeyPatch, order: torch.Tensor) -> None:
    """Have the checkpoint's mapping permute the inputs of the attention's output."""

    class Permute(ConversionOps):
        def convert(self, input_dict: Any, target_patterns: list[str], **_: Any) -> Any:
            (tensors,) = input_dict.values()
            return {target_patterns[0]: tensors[0][:, order]}

    remap_output(monkeypatch, ["o_proj.weight"], [Permute()])


def remap_output(
    monkeypatch: pytest.MonkeyPatch, sources: list[str], operations: list[ConversionOps]
) -> None:
    """Have the attention's output made of its `sources` by `operations`."""
    true_mapping = PackedCheckpoint.mapping

    def mapping(self: PackedCheckpoint, model: PreTrainedModel) -> Mapping:
        found = true_mapping(self, model)
        for target in found.assemblies:
            path, _, leaf = target.partition("o_proj.weight")
            if path != target and not leaf:
                converter = WeightConverter(sources, "o_proj.weight", operations)
                names = [[path + source] for source in sources]
                pairs = dict(zip(converter.source_patterns, names, strict=True))
                found.assemblies[target] = Assembly(target, converter, pairs)
        return found

    monkeypatch.setattr(PackedCheckpoint, "mapping", mapping)


@pytest.mark.parametrize(
    "key, value, kept",
    [("q4_0", "q8_0", "q8_0"), ("q5_0", "q4_0", "q5_0"), ("q4_1", "q4_0", "F32")],
)
def test_rows_of_different_codecs(
    key: str, value: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay packed where one codec holds the other's values exactly."""
    source = tiny_checkpoint("mixtral", tmp_path / "source")
    remap_output(monkeypatch, ["k_proj.weight", "v_proj.weight"], [Concatenate(dim=0)])

    def kinds(name: str) -> tuple[str, int] | None:
        found = {"k_proj.weight": key, "v_proj.weight": value}.get(name.partition("attn.")[2])
        return (found, 1) if found else None

    packed, _ = assert_kept(monkeypatch, source, tmp_path, kinds)
    stored = {r.dtype for r in packed.manifest.residents if r.name.endswith("o_proj.weight")}
    assert stored == {kept}


def test_codecs_that_hold_others() -> None:
    """Found from their descriptions, and true of their values."""
    pairs = {(a, b) for a in NAMES for b in NAMES if a != b and holds(find_codec(a), find_codec(b))}
    assert {("q5_k", "q4_k"), ("q6_k", "q3_k"), ("q8_0", "iq4_nl"), ("q5_1", "q4_1")} <= pairs
    assert ("q4_k", "q5_k") not in pairs and ("q8_0", "mxfp4") not in pairs
    for wide, narrow in ((find_codec(a), find_codec(b)) for a, b in pairs):
        fields = random_fields(narrow, 33, 512)
        assert torch.equal(
            dequantise(wide, widen(fields, narrow, wide)), dequantise(narrow, fields)
        )
