"""Models that llama.cpp wrote to GGUF give, converted, the logits that transformers gives the
originals; so do the other layouts that their tensors have in older files."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from tests.checkpoints import quiet
from tests.gguf_fixtures import FIXTURES
from tests.gguf_models import MODELS, OTHERS

import tierrun
from tierrun.engine.architecture import build_meta, read_config
from tierrun.io.errors import CheckpointError
from tierrun.tools.mapping import Assembly, Mapping
from tierrun.tools.sources.files import read_json
from tierrun.tools.sources.gguf_names import map_gguf
from tierrun.tools.sources.opening import open_source

Tensors = dict[str, torch.Tensor]

Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module", autouse=True)
def _quietly() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        yield
    torch.set_num_threads(threads)


def file_of(name: str) -> Path:
    return sorted((FIXTURES / name).glob("*.gguf"))[0]


def tensors_of(name: str) -> Tensors:
    return {
        tensor.name: torch.from_numpy(tensor.data.copy())
        for path in sorted((FIXTURES / name).glob("*.gguf"))
        for tensor in gguf.GGUFReader(path).tensors
    }


def converted_logits(file: Path, ids: torch.Tensor, **options: Path) -> torch.Tensor:
    """What the model in `file`, converted, says of the tokens `ids`."""
    with TemporaryDirectory() as store:
        tierrun.convert(file, store, **options)
        with tierrun.load(store, ram="1GiB", exact=True) as engine:
            return engine.logits(ids.tolist())


def error(name: str, file: Path, **options: Path) -> float:
    """The largest difference of a logit of `file`, converted, from those of fixture `name`, by
    their spread: what rounding does depends on the machine's vector instructions."""
    wanted = load_file(FIXTURES / name / "reference.safetensors")
    logits = converted_logits(file, wanted["ids"], **options)
    assert logits.shape == wanted["logits"].shape
    spread = wanted["logits"].std()
    assert spread > 1, "logits that hardly differ prove little"
    return ((logits - wanted["logits"]).abs().max() / spread).item()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_original(name: str) -> None:
    assert error(name, file_of(name)) <= 1e-4


def rewrite(name: str, file: Path, change: Callable[[Tensors], Tensors], **keys: int) -> Path:
    """A copy of fixture `name` in `file`: `change` made to the tensors, some numbers to `keys`
    (`__` is `.`; 0 drops one). Tensors of bytes are quantised ones."""
    reader = gguf.GGUFReader(file_of(name))
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(file, architecture)
    changes = {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "split.", "general.architecture")) or changes.get(key) == 0:
            continue
        element = field.types[-1] if len(field.types) > 1 else None
        value = changes.get(key, field.contents())
        writer.add_key_value(key, value, field.types[0], sub_type=element)
    for tensor, values in change(tensors_of(name)).items():
        kind = Q8 if values.dtype == torch.uint8 else None
        writer.add_tensor(tensor, values.contiguous().numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def one_by_one(tensors: Tensors) -> Tensors:
    """Experts as llama.cpp had them at first: a tensor each."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if "_exps." in name:
            stem, suffix = name.split("_exps.")
            made |= {f"{stem}.{number}.{suffix}": one for number, one in enumerate(tensor)}
        else:
            made[name] = tensor
    return made


def merged(tensors: Tensors) -> Tensors:
    """Gate and up of all experts in one tensor."""
    made = dict(tensors)
    for name in tensors:
        if "ffn_gate_exps" in name:
            both = [made.pop(name), made.pop(name.replace("gate", "up"))]
            made[name.replace("gate", "gate_up")] = torch.cat(both, dim=1)
    return made


def parted(tensors: Tensors) -> Tensors:
    """The contrary of `merged`."""
    made = dict(tensors)
    for name in tensors:
        if "ffn_gate_up_exps" in name:
            gate, up = made.pop(name).chunk(2, dim=1)
            made |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
    return made


def whole_latent(tensors: Tensors) -> Tensors:
    """DeepSeek's kv_b as it was before llama.cpp split it."""
    made = dict(tensors)
    for name in tensors:
        if "attn_k_b" in name:
            k, v = made.pop(name), made.pop(name.replace("k_b", "v_b"))
            whole = torch.cat([k.transpose(1, 2), v], dim=1).flatten(0, 1)
            made[name.replace("attn_k_b", "attn_kv_b")] = whole
    return made


def joined_qkvz(tensors: Tensors) -> Tensors:
    """Qwen3-Next's first projection as the first files had it: as the checkpoint has it."""
    made = dict(tensors)
    for name in tensors:
        if "attn_gate" in name:
            z, qkv = made.pop(name), made.pop(name.replace("attn_gate", "attn_qkv"))
            q, k, v = qkv.split([32, 32, 64])
            parts = [part.reshape(2, -1, part.shape[1]) for part in (q, k, v, z)]
            made[name.replace("attn_gate", "ssm_in")] = torch.cat(parts, dim=1).flatten(0, 1)
    return made


def flat_gates(tensors: Tensors) -> Tensors:
    """A shared expert's gate as a vector, whose only row nobody wrote down."""
    return {name: one[0] if "inp_shexp" in name else one for name, one in tensors.items()}


def half_turning(tensors: Tensors) -> Tensors:
    """Gemma's frequencies such that half of each head turns."""
    freqs = torch.ones_like(tensors["rope_freqs.weight"])
    freqs[len(freqs) // 2 :] = 1e30
    return tensors | {"rope_freqs.weight": freqs}


def test_frequencies_in_the_file_say_what_gemma_rotates(tmp_path: Path) -> None:
    file = rewrite("gemma4", tmp_path / "half.gguf", half_turning)
    with open_source(file) as source:
        rope = read_json(source.directory / "config.json")["rope_parameters"]
    assert rope["full_attention"]["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("name", "change", "keys"),
    [
        ("mixtral", one_by_one, {}),
        ("mixtral", merged, {}),
        ("qwen2moe", one_by_one, {}),
        ("qwen2moe", flat_gates, {}),
        ("gemma4", parted, {}),
        ("qwen3next", parted, {}),
        ("qwen3next", joined_qkvz, {}),
        (
            "deepseek_v2",
            whole_latent,
            {
                "attention__key_length": 24,
                "attention__value_length": 16,
                "attention__key_length_mla": 0,
                "attention__value_length_mla": 0,
            },
        ),
    ],
)
def test_older_layouts(
    name: str, change: Callable[[Tensors], Tensors], keys: dict[str, int], tmp_path: Path
) -> None:
    file = rewrite(name, tmp_path / f"{name}.gguf", change, **keys)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in gguf.GGUFReader(file).tensors}
    assert shapes != {key: tuple(one.shape[::-1]) for key, one in tensors_of(name).items()}
    assert error(name, file) <= 1e-4


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", *OTHERS])
def test_a_given_configuration_serves_as_well(name: str) -> None:
    assert error(name, file_of(name), config=FIXTURES / name) <= 1e-4


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_needs_its_configuration(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--config"):
        tierrun.convert(file_of(name), tmp_path / "store")


def packed(tensors: Tensors) -> Tensors:
    """What llama-quantize takes, in blocks of bytes."""
    return {
        name: torch.from_numpy(quantize(one.numpy(), Q8)) if _is_quantisable(name, one) else one
        for name, one in tensors.items()
    }


def _is_quantisable(name: str, tensor: torch.Tensor) -> bool:
    kept = ("ffn_gate_inp", "conv", "bias", "scale")
    return tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 and not any(map(name.count, kept))


def unpacked(tensors: Tensors) -> Tensors:
    """The values that `packed` keeps of the tensors."""
    return {
        name: torch.from_numpy(dequantize(one.numpy(), Q8)) if one.dtype == torch.uint8 else one
        for name, one in packed(tensors).items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_quantised_matrices_follow(name: str, tmp_path: Path) -> None:
    """Blocks are moved, split and joined as the values in them would be."""
    ids = load_file(FIXTURES / name / "reference.safetensors")["ids"]
    logits = [
        converted_logits(rewrite(name, tmp_path / f"{change.__name__}.gguf", change), ids)
        for change in (packed, unpacked)
    ]
    assert (logits[0] - logits[1]).abs().max() <= 1e-3


def mapped(name: str, tensors: Tensors) -> Mapping:
    architecture = gguf.GGUFReader(file_of(name)).fields["general.architecture"].contents()
    return map_gguf(build_meta(read_config(FIXTURES / name)), tensors, architecture)


def run(name: str, assembly: Assembly, tensors: Tensors) -> torch.Tensor:
    """What becomes of `tensors` in `assembly`."""
    if assembly.converter is None:
        return tensors[assembly.names[0]]
    model = build_meta(read_config(FIXTURES / name))
    lists = {key: [tensors[n] for n in names] for key, names in assembly.sources.items()}
    assembly.converter.collected_tensors.update(lists)
    made = assembly.converter.convert(assembly.target, model=model, config=model.config)
    (result,) = made.values()
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_only_moved(name: str) -> None:
    """So that a quantised matrix can follow: each element of the sources once, whatever it is."""
    tensors = tensors_of(name)
    count = iter(range(len(tensors)))
    numbers = {
        key: torch.arange(tensor.numel(), dtype=torch.int32).view(tensor.shape)
        + next(count) * 2**20
        for key, tensor in tensors.items()
    }
    empty = {key: tensor.to("meta") for key, tensor in numbers.items()}
    for assembly in mapped(name, tensors).assemblies.values():
        sources = [numbers[source].flatten() for source in assembly.names]
        if all(numbers[source].ndim > 1 for source in assembly.names):
            made = run(name, assembly, numbers)
            assert made.dtype == torch.int32
            assert torch.equal(made.flatten().sort().values, torch.cat(sources).sort().values)
            assert run(name, assembly, empty).shape == made.shape


@pytest.mark.parametrize("name", MODELS)
def test_an_expert_alone_is_what_it_is_among_all(name: str) -> None:
    tensors = tensors_of(name)
    for target, assembly in mapped(name, tensors).assemblies.items():
        if ".experts." in target and "scale" not in target:
            whole = run(name, assembly, tensors)
            alone = run(name, assembly, {key: tensors[key][1:2] for key in assembly.names})
            assert torch.equal(alone, whole[1:2])


def test_what_the_model_does_not_want_is_unused() -> None:
    unused = mapped("qwen35moe", tensors_of("qwen35moe")).unused
    assert "blk.2.nextn.eh_proj.weight" in unused
    assert all(name.startswith("blk.2.") for name in unused)
    assert set(mapped("gemma4", tensors_of("gemma4")).unused) == {"rope_freqs.weight"}


@pytest.mark.parametrize(
    "extra", ["blk.1.attn_strange.weight", "blk.0.attn_sinks.weight", "blk.2.attn_q.weight", "odd"]
)
def test_a_tensor_without_a_place_is_named(extra: str) -> None:
    tensors = tensors_of("qwen3moe") | {extra: torch.zeros(4)}
    with pytest.raises(CheckpointError, match=extra):
        mapped("qwen3moe", tensors)


@pytest.mark.parametrize(
    "lost",
    [
        "blk.1.attn_q.weight",
        "blk.0.ffn_up_exps.weight",
        "output_norm.weight",
        "blk.1.ffn_norm.weight",
    ],
)
def test_a_tensor_that_is_not_there_is_named(lost: str, tmp_path: Path) -> None:
    def without(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name != lost}

    with pytest.raises(CheckpointError):
        tierrun.convert(rewrite("qwen3moe", tmp_path / "a.gguf", without), tmp_path / "store")


def test_an_architecture_unknown_to_gguf_is_named() -> None:
    model = build_meta(read_config(FIXTURES / "mixtral"))
    with pytest.raises(CheckpointError, match="does not know the architecture later"):
        map_gguf(model, tensors_of("mixtral"), "later")


def test_an_architecture_that_nobody_tested_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = build_meta(read_config(FIXTURES / "mixtral"))
    with suppress(CheckpointError):
        map_gguf(model, tensors_of("mixtral"), "phimoe")
    assert "phimoe have not been tested" in caplog.text
