"""A GGUF file's metadata gives back the configuration that it was written from, or says why not."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.checkpoints import quiet
from tests.gguf_fixtures import FIXTURES
from tests.gguf_models import MODELS
from transformers import AutoConfig

from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.gguf_config import hf_config
from tierrun.tools.sources.gguf_header import read_gguf_header

Metadata = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

INERT = {
    "_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "num_nextn_predict_layers",
    "rotary_dim",
    "scoring_func",
    "transformers_version",
    "vocab_size_per_layer_input",
}
"""What changes nothing: names, training, layers that are not used, and what is said elsewhere."""


def read(name: str) -> tuple[Metadata, Shapes]:
    """Metadata and shapes of a fixture, whatever its number of files."""
    metadata: Metadata = {}
    shapes: Shapes = {}
    for path in sorted((FIXTURES / name).glob("*.gguf"), reverse=True):
        header = read_gguf_header(path)
        metadata |= header.metadata
        shapes |= {tensor: found.shape for tensor, found in header.tensors.items()}
    return metadata, shapes


FILES = {name: read(name) for name in MODELS}


def complete(config: Metadata) -> Metadata:
    """What transformers makes of a config.json, without what is inert."""
    with quiet():
        made = AutoConfig.for_model(**config).to_dict()
    return {key: value for key, value in made.items() if key not in INERT}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_original(name: str) -> None:
    with quiet():
        original = AutoConfig.from_pretrained(FIXTURES / name).to_dict()
    wanted = {key: value for key, value in original.items() if key not in INERT}
    if name == "glm4moe":  # the file knows all three tokens that end an answer
        wanted["eos_token_id"] = [2, 5, 6]
    assert complete(hf_config(*FILES[name])) == wanted


@pytest.mark.parametrize("name", MODELS)
def test_it_names_the_class_as_the_original_does(name: str) -> None:
    with quiet():
        original = AutoConfig.from_pretrained(FIXTURES / name)
    assert hf_config(*FILES[name])["architectures"] == original.architectures


ESSENTIAL = (
    "block_count",
    "embedding_length",
    "context_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "expert_used_count",
)


BAD = (None, "many", [], -1, float("nan"), 1 << 200, True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("key", ESSENTIAL)
def test_a_bad_number_is_named(name: str, key: str) -> None:
    metadata, shapes = FILES[name]
    full = f"{metadata['general.architecture']}.{key}"
    for value in BAD:
        with pytest.raises(CheckpointError, match=full):
            hf_config(metadata | {full: value}, shapes)


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(0, 9), st.booleans()), max_size=5),
)


@given(st.data())
def test_damaged_metadata_gives_our_error_or_a_configuration(data: st.DataObject) -> None:
    metadata, shapes = FILES[data.draw(st.sampled_from(sorted(FILES)))]
    keys = sorted(key for key in metadata if key.rpartition(".")[2] not in ("tokens", "merges"))
    changes = data.draw(st.dictionaries(st.sampled_from(keys), _VALUES, max_size=4))
    dropped = data.draw(st.sets(st.sampled_from(keys), max_size=2))
    damaged = {key: value for key, value in (metadata | changes).items() if key not in dropped}
    lost = data.draw(st.sets(st.sampled_from(sorted(shapes)), max_size=2))
    flat = data.draw(st.sets(st.sampled_from(sorted(shapes)), max_size=2))
    left = {
        tensor: shape[:1] if tensor in flat else shape
        for tensor, shape in shapes.items()
        if tensor not in lost
    }
    try:
        config = hf_config(damaged, left)
    except CheckpointError as error:
        assert str(error)
    else:
        assert config["num_hidden_layers"] > 0


@pytest.mark.parametrize("count", [None, 0])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_dense_model_is_refused(architecture: str, count: int | None) -> None:
    metadata = {"general.architecture": architecture, f"{architecture}.expert_count": count}
    with pytest.raises(CheckpointError, match=f"{architecture} is a dense model: it has no routed"):
        hf_config({key: value for key, value in metadata.items() if value is not None}, {})


def test_another_architecture_is_refused_with_what_to_do() -> None:
    with pytest.raises(CheckpointError, match=r"grok.*--config HF_DIR_OR_ID"):
        hf_config({"general.architecture": "grok", "grok.expert_count": 8}, {})


def changed(name: str, **changes: Any) -> Metadata:
    """The configuration of a fixture with some keys changed (`__` is `.`) or dropped (None)."""
    metadata, shapes = FILES[name]
    prefix = metadata["general.architecture"]
    new = {f"{prefix}.{key.replace('__', '.')}": value for key, value in changes.items()}
    kept = {key: value for key, value in (metadata | new).items() if value is not None}
    return hf_config(kept, shapes)


def test_silence_means_what_the_loader_assumes() -> None:
    assert (
        changed("qwen3moe", attention__key_length=None, rope__dimension_count=None)["head_dim"]
        == 16
    )
    assert changed("qwen3moe", rope__freq_base=None)["rope_parameters"]["rope_theta"] == 10000
    assert changed("mixtral", attention__head_count_kv=None)["num_key_value_heads"] == 4
    assert changed("glm4moe", expert_weights_scale=None)["routed_scaling_factor"] == 1
    assert changed("glm4moe", expert_weights_norm=None)["norm_topk_prob"] is False
    assert changed("deepseek_v3", expert_gating_func=None)["model_type"] == "deepseek_v3"
    assert changed("deepseek_v2", expert_group_count=None)["topk_method"] == "greedy"
    assert changed("qwen2moe", feed_forward_length=None)["intermediate_size"] == 32


def test_recurrent_layers_follow_from_the_interval() -> None:
    made = changed("qwen3next", attention__recurrent_layers=None, full_attention_interval=2)
    assert made["layer_types"] == ["linear_attention", "full_attention"]
    with pytest.raises(CheckpointError, match="recurrent_layers"):
        changed("qwen3next", attention__recurrent_layers=[True])


def test_latent_attention_before_its_matrix_was_split() -> None:
    old = changed(
        "deepseek_v2",
        attention__key_length_mla=None,
        attention__value_length_mla=None,
        attention__key_length=24,
        attention__value_length=16,
    )
    assert old == changed("deepseek_v2")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("minimax-m2", {"expert_gating_func": 1}, "expert_gating_func.*sigmoid"),
        ("deepseek_v3", {"expert_gating_func": 4}, "expert_gating_func"),
        ("qwen3moe", {"expert_weights_scale": 2.5}, "expert_weights_scale"),
        ("mixtral", {"rope__dimension_count": 8}, "rope.dimension_count"),
        ("mixtral", {"rope__scaling__type": "longrope"}, "rope.scaling.type.*--config"),
        ("mixtral", {"attention__head_count_kv": [2, 4]}, "head_count_kv.*differs"),
        ("gemma4", {"feed_forward_length": [32, 48]}, "feed_forward_length"),
        ("gemma4", {"attention__sliding_window_pattern": [True]}, "sliding_window_pattern"),
        ("qwen3next", {"ssm__group_count": 3}, "time_step_rank"),
        ("glm4moe", {"nextn_predict_layers": 3}, "nextn_predict_layers"),
        ("mixtral", {"block_count": 5}, "block_count.*block 2 has no tensors"),
        ("mixtral", {"embedding_length": 128}, "embedding_length"),
        ("qwen3moe", {"expert_used_count": 6}, "expert_used_count"),
        ("qwen3moe", {"expert_count": 6}, "expert_count.*has 5 rows"),
    ],
)
def test_what_cannot_be_said_in_a_configuration_is_refused(
    name: str, changes: Metadata, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        changed(name, **changes)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma4"])
def test_scaled_frequencies_are_refused(name: str) -> None:
    metadata, shapes = FILES[name]
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight.*--config"):
        hf_config(metadata, shapes | {"rope_freqs.weight": (12,)})


def test_a_special_token_outside_the_vocabulary_is_named() -> None:
    metadata, shapes = FILES["mixtral"]
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.eos_token_id"):
        hf_config(metadata | {"tokenizer.ggml.eos_token_id": 296}, shapes)


def test_gemma_rotates_what_the_frequencies_show() -> None:
    for freqs, part in (([1.0] * 8 + [1e30] * 8, 0.5), ([1.0] * 16, 1.0), (None, 0.25)):
        config = hf_config(*FILES["gemma4"], freqs)
        assert config["rope_parameters"]["full_attention"]["partial_rotary_factor"] == part


def test_gemma_without_shared_keys_has_one_number_of_heads() -> None:
    metadata, shapes = FILES["gemma4"]
    own = shapes | {"blk.1.attn_v.weight": (32, 64)}
    one = hf_config(metadata | {"gemma4.attention.head_count_kv": [2, 2]}, own)
    assert (one["attention_k_eq_v"], one["num_key_value_heads"]) == (False, 2)
    with pytest.raises(CheckpointError, match="head_count_kv"):
        hf_config(metadata, own)


def test_sharing_layers_may_be_twice_as_wide() -> None:
    config = changed("gemma4", feed_forward_length=[32, 64], attention__shared_kv_layers=1)
    assert (config["intermediate_size"], config["use_double_wide_mlp"]) == (32, True)


def test_numbers_are_the_shortest_that_the_file_has() -> None:
    assert hf_config(*FILES["mixtral"])["rms_norm_eps"] == 2e-5


def test_yarn_keeps_its_attention_factor() -> None:
    made = changed("qwen3moe", rope__scaling__yarn_attn_factor=1.25)
    assert made["rope_parameters"]["attention_factor"] == 1.25


def without(shapes: Shapes, pattern: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not re.search(pattern, name)}


def test_layers_without_a_router_are_dense() -> None:
    metadata, shapes = FILES["qwen3moe"]
    config = hf_config(metadata, without(shapes, r"blk\.0\.ffn_gate_inp"))
    assert config["mlp_only_layers"] == [0]
    metadata, shapes = FILES["mixtral"]
    with pytest.raises(CheckpointError, match="no layer has a router"):
        hf_config(metadata, without(shapes, "ffn_gate_inp"))


def test_dense_layers_lead() -> None:
    metadata, shapes = FILES["deepseek_v3"]
    first = {"blk.0.ffn_gate_inp.weight": (6, 64), "blk.0.ffn_down_exps.weight": (6, 64, 32)}
    assert hf_config(metadata, shapes)["first_k_dense_replace"] == 1
    assert hf_config(metadata, shapes | first)["first_k_dense_replace"] == 0
    shuffled = without(shapes, r"blk\.1\.ffn_gate_inp") | first
    with pytest.raises(CheckpointError, match=r"layers \[0\] have routers"):
        hf_config(metadata, shuffled)


def test_biases_are_seen_in_the_file() -> None:
    metadata, shapes = FILES["qwen3moe"]
    assert hf_config(metadata, shapes | {"blk.0.attn_q.bias": (96,)})["attention_bias"] is True


def test_the_pattern_of_windows_is_taken_where_it_is_said() -> None:
    made = changed("gpt-oss", attention__sliding_window_pattern=[False, True])
    assert made["layer_types"] == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("groups", [{"expert_group_count": 4}, {"expert_group_used_count": 3}])
def test_groups_must_divide_the_experts(groups: Metadata) -> None:
    with pytest.raises(CheckpointError, match=next(iter(groups))):
        changed("deepseek_v3", **groups)


def test_groups_that_an_older_file_does_not_say_are_said(caplog: pytest.LogCaptureFixture) -> None:
    metadata, shapes = FILES["deepseek_v3"]
    silent = {key: value for key, value in metadata.items() if "expert_group" not in key}
    assert hf_config(silent, shapes)["n_group"] == 1
    assert "groups" not in caplog.text
    many = silent | {"deepseek2.expert_count": 256}
    assert hf_config(many, shapes | {"blk.1.ffn_gate_inp.weight": (256, 64)})["topk_group"] == 1
    assert "does not say in which groups" in caplog.text
