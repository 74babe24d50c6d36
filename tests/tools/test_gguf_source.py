"""GGUF files as a source of tensors: exact values, split files, and what damaged ones get."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tests.ggufs import FIXTURES, model_bytes, spoilt
from tests.stores import contents

from tierrun.engine.codecs.expand import dequantise
from tierrun.io.errors import CheckpointError, TierrunError
from tierrun.io.store import Store
from tierrun.tools.convert import convert
from tierrun.tools.sources.ggml_blocks import CODECS
from tierrun.tools.sources.gguf import GgufCheckpoint
from tierrun.tools.sources.hub import locate

MIXTRAL = FIXTURES / "mixtral" / "mixtral.gguf"
Q4_0, Q8_0, IQ2_XXS, Q8_K, MXFP4 = 2, 8, 16, 15, 39
ROWS = (2, 3)


def blocks(kind: int, columns: int) -> np.ndarray[Any, Any]:
    """Random rows [2, 3, row bytes] whose scales are numbers."""
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    generator = np.random.default_rng(kind)
    values = generator.integers(0, 60, (*ROWS, columns // block, nbytes), np.uint8)
    return values.reshape(*ROWS, -1)


def opened(path: Path, tensor: np.ndarray[Any, Any], kind: int, **options: Any) -> GgufCheckpoint:
    """A checkpoint whose only tensor is `x`, with a configuration from elsewhere."""
    path.write_bytes(model_bytes({"general.architecture": "qwen3moe"}, {"x": (tensor, kind)}))
    return GgufCheckpoint.open([path], config=FIXTURES / "qwen3moe", **options)


@pytest.mark.parametrize("kind", CODECS, ids=CODECS.get)
def test_quantised_tensors_read_exactly(kind: int, tmp_path: Path) -> None:
    raw = blocks(kind, 512)
    wanted = torch.from_numpy(dequantize(raw, GGMLQuantizationType(kind)))
    with opened(tmp_path / "a.gguf", raw, kind) as checkpoint:
        assert checkpoint.shape("x") == (2, 3, 512) and checkpoint.dtype("x") == torch.float32
        assert torch.equal(checkpoint.read("x"), wanted)
        assert torch.equal(checkpoint.read("x", 1), wanted[1:])
        assert torch.equal(checkpoint.elements("x", 700, 1900), wanted.flatten()[700:1900])
        packing = checkpoint.packing("x")
        assert packing is not None and packing.axis == 2
        rows = dequantise(packing.codec, checkpoint.fields("x", 2, 5))
        assert torch.equal(rows, wanted.view(6, 512)[2:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_tensors_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(2, 3, 8).to(dtype)
    kind = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}[dtype]
    raw = values.view(torch.uint8).numpy()
    with opened(tmp_path / "a.gguf", raw, kind) as checkpoint:
        assert checkpoint.dtype("x") == dtype and checkpoint.packing("x") is None
        assert torch.equal(checkpoint.read("x"), values)
        assert torch.equal(checkpoint.elements("x", 5, 29), values.flatten()[5:29])


def test_type_without_codec(tmp_path: Path) -> None:
    raw = blocks(IQ2_XXS, 256)
    with pytest.raises(CheckpointError, match=r"tensor x is IQ2_XXS, .*--requant q4_0 .*\(lossy\)"):
        opened(tmp_path / "a.gguf", raw, IQ2_XXS)
    with opened(tmp_path / "a.gguf", raw, IQ2_XXS, requant=True) as checkpoint:
        assert checkpoint.lossy == {"x"} and checkpoint.packing("x") is None
        wanted = dequantize(raw, GGMLQuantizationType(IQ2_XXS))
        assert torch.equal(checkpoint.read("x"), torch.from_numpy(wanted))
    with pytest.raises(CheckpointError, match="tensor x is Q8_K, which gguf cannot expand"):
        opened(tmp_path / "a.gguf", blocks(Q8_K, 256), Q8_K, requant=True)


SCALES = {2: 0, 3: 2, 8: 0, 10: 82, 11: 108, 12: 0, 13: 2, 14: 208, 20: 0, 23: 0}
"""A type → where in a block one of its halves is."""


@pytest.mark.parametrize("kind", SCALES, ids=CODECS.get)
@pytest.mark.parametrize("bits", [0x7C00, 0x7E01])
def test_scale_that_is_no_number_is_named(kind: int, bits: int, tmp_path: Path) -> None:
    raw = blocks(kind, 512)
    place = GGML_QUANT_SIZES[GGMLQuantizationType(kind)][1] + SCALES[kind]
    raw[1, 2, place : place + 2] = (bits & 0xFF, bits >> 8)
    with opened(tmp_path / "a.gguf", raw, kind) as checkpoint:
        checkpoint.elements("x", 0, 5 * 512)
        for read in (lambda: checkpoint.read("x"), lambda: checkpoint.fields("x", 3, 6)):
            with pytest.raises(CheckpointError, match="tensor x has a scale in row 5 that is NaN"):
                read()


def test_exponent_that_is_no_number_is_named(tmp_path: Path) -> None:
    raw = blocks(MXFP4, 64)
    raw[0, 1, 17] = 255
    with (
        opened(tmp_path / "a.gguf", raw, MXFP4) as checkpoint,
        pytest.raises(CheckpointError, match="tensor x has a scale in row 1 that is NaN"),
    ):
        checkpoint.read("x")


def test_scale_that_is_no_number_ends_a_conversion(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, tuple[Any, int]]) -> None:
        values, _ = tensors["blk.1.ffn_down_exps.weight"]
        values.reshape(-1, values.shape[-1])[7, :2] = (0, 0x7E)

    path = spoilt("mixtral", tmp_path / "a.gguf", kinds=lambda _: Q8_0, tensors=spoil)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down_exps\.weight .* row 7 "):
        convert(path, tmp_path / "store")


# files


@pytest.fixture
def pieces(tmp_path: Path) -> list[Path]:
    """A model in two files, to be spoilt."""
    found = sorted((FIXTURES / "olmoe").glob("*.gguf"))
    return [Path(shutil.copy(path, tmp_path)) for path in found]


def test_pieces_are_found_from_any(pieces: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mmproj-olmoe-F16.gguf").write_bytes(b"a vision tower")
    for number, source in enumerate((*pieces, tmp_path)):
        convert(source, tmp_path / str(number))
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


def test_missing_piece_is_named(pieces: list[Path], tmp_path: Path) -> None:
    pieces[0].unlink()
    for source in (pieces[1], tmp_path):
        with pytest.raises(CheckpointError, match=f"{pieces[0].name} is missing"):
            locate(source)


def test_pieces_of_other_models_are_refused(pieces: list[Path]) -> None:
    shutil.copy(pieces[0], pieces[1])
    with pytest.raises(CheckpointError, match=r"piece 0 \(from 0\) of 2, its name that it is 1"):
        GgufCheckpoint.open(pieces)
    alone = Path(shutil.copy(pieces[0], pieces[0].parent / "alone.gguf"))
    with pytest.raises(CheckpointError, match="of 2, its name that it is 0 of 1"):
        GgufCheckpoint.open([alone])


def test_pieces_with_too_few_tensors_are_refused(tmp_path: Path) -> None:
    path = spoilt(
        "mixtral",
        tmp_path / "a.gguf",
        metadata=lambda said: said.update({"split.tensors.count": 400}),
    )
    with pytest.raises(CheckpointError, match="400 tensors are promised, the pieces hold 23"):
        GgufCheckpoint.open([path])


def test_several_models_in_a_directory(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        shutil.copy(MIXTRAL, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"2 models: a-Q4_K_M\.gguf, a-Q8_0\.gguf; name one"):
        locate(tmp_path)


def test_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    def other(tensors: dict[str, tuple[Any, int]]) -> None:
        for values, _ in tensors.values():
            values += 1

    prints = set()
    for number, change in enumerate((lambda _: None, lambda _: None, other)):
        (tmp_path / str(number)).mkdir()
        path = spoilt("mixtral", tmp_path / str(number) / "a.gguf", tensors=change)
        with GgufCheckpoint.open([path]) as checkpoint:
            prints.add(checkpoint.fingerprint())
    assert len(prints) == 2


def test_file_cut_off_while_it_is_read(tmp_path: Path) -> None:
    path = Path(shutil.copy(MIXTRAL, tmp_path))
    with GgufCheckpoint.open([path]) as checkpoint:
        os.truncate(path, path.stat().st_size - 4096)
        with pytest.raises(CheckpointError, match="reading blk.* failed"):
            for name in checkpoint.tensors:
                checkpoint.read(name)


@pytest.mark.parametrize("kind", [0, Q4_0], ids=["f32", "q4_0"])
def test_interrupted_conversion_continues(kind: int, tmp_path: Path) -> None:
    path = spoilt("qwen3moe", tmp_path / "a.gguf", kinds=lambda _: kind)

    def stop(done: int, total: int) -> None:
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "store", progress=stop)
    first: list[int] = []
    convert(path, tmp_path / "store", progress=lambda done, _: first.append(done))
    convert(path, tmp_path / "whole")
    assert first[0] > 0 and contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert Store.open([tmp_path / "store"]).manifest.model_id == "Qwen3Moe"


# hub


def test_hub_id_with_a_quantisation(
    pieces: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshot"
    (snapshot / "Q4_K_M").mkdir(parents=True)
    for path in pieces:
        shutil.copy(path, snapshot / "Q4_K_M" / path.name.replace("olmoe", "O-Q4_K_M"))
    for name in ("mmproj-Q4_K_M.gguf", "O-Q8_0.gguf", "O-UD-Q4_K_M.gguf"):
        (snapshot / name).write_bytes(b"another")
    asked: list[Any] = []

    def download(model_id: str, **options: Any) -> str:
        asked.append((model_id, options["allow_patterns"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = locate("someone/O-GGUF:q4_k_m")
    assert [path.name for path in found.files] == [
        "O-Q4_K_M-00001-of-00002.gguf",
        "O-Q4_K_M-00002-of-00002.gguf",
    ]
    assert asked == [("someone/O-GGUF", ["*Q4_K_M*.gguf", "*q4_k_m*.gguf"])]
    with pytest.raises(CheckpointError, match="someone/O-GGUF:IQ3_S has no model's .gguf file"):
        locate("someone/O-GGUF:IQ3_S")
    with pytest.raises(CheckpointError, match="say which: someone/O-GGUF:Q4_K_M"):
        locate("someone/O-GGUF")


def test_options_are_for_ggufs(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TierrunError, match="--config and --tokenizer are for GGUF files"):
        convert(source, tmp_path / "store", tokenizer=source)
