"""Sizes from a configuration alone are those of the store that conversion then makes."""

from pathlib import Path

import pytest
import torch
from tests.checkpoints import FAMILIES, tiny_checkpoint

from tierrun.engine.architecture import read_config
from tierrun.io.store import Manifest
from tierrun.tools.choices import Quantising
from tierrun.tools.convert import plan as plan_conversion
from tierrun.tools.layout import SHARD_BYTES
from tierrun.tools.plan.recode import codecs_of, recode
from tierrun.tools.plan.sketch import sketch
from tierrun.tools.sources.opening import open_source


def converted(directory: Path, codec: str | None) -> Manifest:
    with open_source(directory) as source:
        quantising = Quantising.parse(codec, None, None)
        return plan_conversion(source, 1, None, SHARD_BYTES, quantising)[1].manifest


def sizes(manifest: Manifest) -> tuple[object, ...]:
    layers = [
        (x.top_k, len(x.records), manifest.class_of(i)) for i, x in enumerate(manifest.layers)
    ]
    return layers, manifest.expert_bytes, manifest.resident_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_conversion(family: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(family, tmp_path, dtype=torch.bfloat16)
    guessed = sketch(read_config(directory), family)
    assert sizes(guessed) == sizes(converted(directory, None))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize("codec", ["q8_0", "q4_0", "mxfp4"])
def test_sizes_of_quantised_experts(family: str, codec: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(family, tmp_path, dtype=torch.bfloat16)
    guessed = recode(sketch(read_config(directory), family), codec)
    assert codecs_of(guessed) == codec
    assert sizes(guessed) == sizes(converted(directory, codec))
