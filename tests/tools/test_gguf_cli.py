"""`tierrun convert` on GGUF files, good and bad: one line and an exit code, never a traceback."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from tests.ggufs import FIXTURES, Tensor, gguf_bytes, metadata_pair, spoilt
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tierrun.io.store import Store
from tierrun.tools import cli
from tierrun.tools.sources.gguf_header import read_gguf_header

MIXTRAL = FIXTURES / "mixtral" / "mixtral.gguf"

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`tierrun convert` with some arguments, into tmp_path/store: exit code and stderr."""

    def convert(*arguments: object) -> tuple[int, str]:
        target = ["--nvme-dir", str(tmp_path / "store")]
        monkeypatch.setattr(sys, "argv", ["tierrun", "convert", *map(str, arguments), *target])
        monkeypatch.setattr(cli, "_set_up_logging", lambda verbose: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return code if isinstance(code, int) else 0, capsys.readouterr().err

    return convert


def test_good_file(run: Run, tmp_path: Path) -> None:
    assert run(MIXTRAL) == (0, "")
    assert Store.open([tmp_path / "store"]).manifest.model_id == "Mixtral"


def test_configuration_from_elsewhere(run: Run, tmp_path: Path) -> None:
    """The original's directory gives configuration and tokenizer, byte for byte."""
    original = FIXTURES / "granitemoe"
    code, error = run(original / "granitemoe.gguf", "--config", original)
    assert (code, error) == (0, "")
    for name in ("config.json", "tokenizer.json"):
        copied = (tmp_path / "store" / "model" / name).read_bytes()
        assert copied == (original / name).read_bytes()


def refused(run: Run, *arguments: object) -> str:
    code, error = run(*arguments)
    assert code == 1 and error.startswith("tierrun: ") and error.count("\n") == 1
    return error


def test_truncated_file(run: Run, tmp_path: Path) -> None:
    path = Path(shutil.copy(MIXTRAL, tmp_path))
    last = list(read_gguf_header(path).tensors.items())[-1]
    os.truncate(path, path.stat().st_size - 40)
    error = refused(run, path)
    assert f"is truncated: tensor {last[0]} wants {last[1].extent.nbytes} bytes" in error


def test_wrong_magic(run: Run, source: Path) -> None:
    assert "is not a GGUF file" in refused(run, source / "model.safetensors")


def test_big_endian(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(order=">"))
    assert "big-endian GGUF" in refused(run, tmp_path / "a.gguf")


def test_missing_file(run: Run, tmp_path: Path) -> None:
    assert "no such directory or file" in refused(run, tmp_path / "nowhere.gguf")


def test_missing_piece(run: Run, tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "olmoe" / "olmoe-00002-of-00002.gguf", tmp_path))
    assert "olmoe-00001-of-00002.gguf is missing" in refused(run, path)


@pytest.mark.parametrize("architecture", ["nonesuch", "clip", "mamba"])
def test_architecture_without_a_map(run: Run, tmp_path: Path, architecture: str) -> None:
    def rename(metadata: dict[str, Any]) -> None:
        metadata["general.architecture"] = architecture

    path = spoilt("mixtral", tmp_path / "a.gguf", metadata=rename)
    assert architecture in refused(run, path) and not (tmp_path / "store").exists()


def test_vision_tower(run: Run, tmp_path: Path) -> None:
    def rename(metadata: dict[str, Any]) -> None:
        metadata["general.type"] = "mmproj"

    path = spoilt("mixtral", tmp_path / "a.gguf", metadata=rename)
    assert "is no model, it says, but 'mmproj'" in refused(run, path)


def test_dense_model(run: Run, tmp_path: Path) -> None:
    def densify(metadata: dict[str, Any]) -> None:
        for key in [key for key in metadata if "expert" in key]:
            del metadata[key]

    def without_experts(tensors: dict[str, tuple[Any, int]]) -> None:
        for name in [name for name in tensors if "exps" in name or "gate_inp" in name]:
            values, kind = tensors.pop(name)
            if "exps" in name:
                tensors[name.replace("_exps", "")] = (values[0], kind)

    path = spoilt("mixtral", tmp_path / "a.gguf", metadata=densify, tensors=without_experts)
    assert "dense" in refused(run, path)


def test_tokenizer_that_cannot_be_rebuilt(run: Run, tmp_path: Path) -> None:
    def rename(metadata: dict[str, Any]) -> None:
        metadata["tokenizer.ggml.pre"] = "whatever"

    path = spoilt("mixtral", tmp_path / "a.gguf", metadata=rename)
    error = refused(run, path)
    assert "its pre-tokenizer 'whatever' is not known" in error and "--tokenizer" in error
    assert run(path, "--tokenizer", FIXTURES / "mixtral")[0] == 0


def test_type_without_codec_is_quantised_anew_when_asked(run: Run, tmp_path: Path) -> None:
    def put(tensors: dict[str, tuple[Any, int]]) -> None:
        for name, (values, _) in tensors.items():
            if "_gate_exps" in name:
                rows = np.full((*values.shape[:-1], 36), 0x38, np.uint8)
                tensors[name] = (rows, GGMLQuantizationType.NVFP4)

    path = spoilt("mixtral", tmp_path / "a.gguf", tensors=put)
    error = refused(run, path)
    assert "ffn_gate_exps.weight is NVFP4" in error and "--requant q4_0" in error
    code, error = run(path, "--requant", "q4_0")
    assert code == 0, error
    codecs = Store.open([tmp_path / "store"]).manifest.classes[0].matrices
    assert "q4_0" in {matrix.codec for matrix in codecs}


# memory


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A real vocabulary, and weights (a hole in the file) that are larger than the memory used."""
    path = hollow(tmp_path / "hollow.gguf")
    command = [sys.executable, "-c", _MEMORY, str(path), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = int(done.stdout)
    assert used < 1 << 30 < path.stat().st_size
    shutil.rmtree(tmp_path / "store")


_MEMORY = """
import sys
from tierrun.bench.peak import peak_rss
from tierrun.tools.convert import convert
convert(sys.argv[1], sys.argv[2])
print(peak_rss())
"""

BF16 = 30
_HIDDEN, _INNER, _EXPERTS, _LAYERS = 2048, 768, 32, 1


def hollow(path: Path) -> Path:
    """A Qwen3-MoE of zeros in bf16, with 150,000 tokens and as many merges."""
    metadata = _sizes(dict(read_gguf_header(FIXTURES / "qwen3moe/qwen3moe.gguf").metadata))
    letters = list(bytes_to_unicode().values())
    pairs = [first + second for first in letters for second in letters]
    triples = [pair + letters[number % 251] for number, pair in enumerate(pairs)]
    triples += [pair + "a" for pair in pairs[:19_000]]
    triples = list(dict.fromkeys(triples))
    special = ["<pad>", "<bos>", "<eos>"]
    tokens = [*special, *letters, *pairs, *triples]
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [
            *(" ".join(pair) for pair in pairs),
            *(f"{triple[:2]} {triple[2]}" for triple in triples),
        ],
    }
    entries, offset = [], 0
    for name, shape in _shapes(len(tokens)).items():
        kind = BF16 if len(shape) > 1 and "inp" not in name else 0
        entries.append(Tensor(name, shape, kind, offset))
        offset += prod(shape) * GGML_QUANT_SIZES[GGMLQuantizationType(kind)][1]
        offset += -offset % 32
    header = gguf_bytes([metadata_pair(*item) for item in metadata.items()], entries)
    path.write_bytes(header)
    os.truncate(path, len(header) + offset)
    return path


def _sizes(metadata: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in metadata.items() if ".rope.scaling" not in key}
    kept.pop("qwen3moe.vocab_size", None)
    sizes = {
        "block_count": _LAYERS,
        "embedding_length": _HIDDEN,
        "feed_forward_length": _INNER,
        "expert_feed_forward_length": _INNER,
        "expert_count": _EXPERTS,
        "attention.head_count": 16,
        "attention.head_count_kv": 4,
        "attention.key_length": 128,
        "attention.value_length": 128,
    }
    return kept | {f"qwen3moe.{key}": value for key, value in sizes.items()}


def _shapes(rows: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (rows, _HIDDEN),
        "output.weight": (rows, _HIDDEN),
        "output_norm.weight": (_HIDDEN,),
    }
    block: dict[str, tuple[int, ...]] = {
        "attn_q": (2048, _HIDDEN),
        "attn_k": (512, _HIDDEN),
        "attn_v": (512, _HIDDEN),
        "attn_output": (_HIDDEN, 2048),
        "attn_norm": (_HIDDEN,),
        "ffn_norm": (_HIDDEN,),
        "attn_q_norm": (128,),
        "attn_k_norm": (128,),
        "ffn_gate_inp": (_EXPERTS, _HIDDEN),
        "ffn_gate_exps": (_EXPERTS, _INNER, _HIDDEN),
        "ffn_up_exps": (_EXPERTS, _INNER, _HIDDEN),
        "ffn_down_exps": (_EXPERTS, _HIDDEN, _INNER),
    }
    for layer in range(_LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes
