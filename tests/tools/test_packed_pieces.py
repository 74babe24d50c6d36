"""Large packed weights pass through a little memory."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from tests.checkpoints import tiny_config
from tests.codecs import NAMES, random_fields

from tierrun.engine.architecture import build_meta
from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.planes import Fields, pack
from tierrun.io.header import build_header
from tierrun.io.store import Store
from tierrun.tools import pieces
from tierrun.tools.gathering import map_fields
from tierrun.tools.pieces import packed_pieces


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("held", [192 << 20, 2000, 0])
def test_pieces_are_the_matrix(name: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many planes are held while the first is given."""
    monkeypatch.setattr(pieces, "_HELD_BYTES", held)
    monkeypatch.setattr(pieces, "_ELEMENTS", 64 * 256)
    codec, shape = find_codec(name), (170, 256)
    fields = random_fields(codec, *shape)

    def rows(start: int, stop: int) -> Fields:
        assert start % 32 == 0
        return map_fields(lambda part: part[start:stop], fields)

    made = torch.cat(list(packed_pieces(codec, shape, rows)))
    assert torch.equal(made, pack(codec, fields))


VOCABULARY, HIDDEN = 150_000, 4096

MEMORY = """
import sys
from tierrun.bench.peak import peak_rss
from tierrun.tools.convert import convert
base = peak_rss()
convert(sys.argv[1], sys.argv[2])
print(peak_rss() - base)
"""


def hollow(directory: Path) -> Path:
    """A checkpoint of holes whose embedding is 614 MB of FP8."""
    config = tiny_config("qwen3_moe", vocab_size=VOCABULARY, hidden_size=HIDDEN)
    config.tie_word_embeddings = True
    config.save_pretrained(directory)
    path = directory / "config.json"
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": blocks}))
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, tensor in build_meta(config).state_dict().items():
        shape = tuple(tensor.shape)
        if name == "model.embed_tokens.weight":
            grid = (-(-VOCABULARY // 128), HIDDEN // 128)
            entries[name] = ("F8_E4M3", shape, prod(shape))
            entries[f"{name}_scale_inv"] = ("F32", grid, 4 * prod(grid))
        elif name != "lm_head.weight":
            entries[name] = ("BF16", shape, 2 * prod(shape))
    header, extents = build_header(entries, {"format": "pt"})
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(extent.end for extent in extents.values()))
    return directory


def test_memory_stays_flat(tmp_path: Path) -> None:
    source = hollow(tmp_path / "source")
    command = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    above = int(done.stdout)
    assert above < 384 << 20
    residents = {r.name: r for r in Store.open([tmp_path / "store"]).manifest.residents}
    assert residents["model.embed_tokens.weight"].dtype == "fp8_g128_f32"
