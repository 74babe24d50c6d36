"""Decode as predicted from the rates that committed results state, beside what they measured.

The table in docs/plan.md has these rows; here they are computed again from the results, so that
neither the arithmetic nor the table can change without the other.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tierrun.bench.gpu_lanes import PROMPT
from tierrun.bench.store_plan import plan_store
from tierrun.bench.synthetic_models import find_model
from tierrun.engine.codecs.dense import DTYPES
from tierrun.tools.plan import routing
from tierrun.tools.plan.decode import decode_times
from tierrun.tools.plan.hits import Hits, Tiers, hits
from tierrun.tools.plan.knowing import GPU_OVERHEAD, IN_PLACE
from tierrun.tools.plan.rates import Rates
from tierrun.tools.plan.shape import Experts, Shape

ROOT = Path(__file__).parents[3]
KV_BYTES = 2


class Row(NamedTuple):
    """Tokens per second."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def text(self) -> str:
        error = f"{self.error:+.0%}".replace("-", "−").replace("%", " %")
        return f"| {self.name} | {self.predicted:.0f} | {self.measured:.0f} | {error} |"


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    return found


def shape_of(like: str, codec: str) -> Shape:
    """Of the synthetic store with everything in `codec`."""
    dimensions = find_model(like)[1].shape
    plan, packed = plan_store(dimensions, codec, codec), codec not in DTYPES
    weights = 3 * dimensions.hidden * dimensions.intermediate
    layer = Experts(dimensions.experts, dimensions.top_k, plan.record.nbytes, weights)
    embedding = 2 * dimensions.vocabulary * dimensions.hidden
    resident = plan.resident_file.shard.nbytes
    kv = 2 * dimensions.layers * dimensions.kv_heads * dimensions.head_dim * KV_BYTES
    layers = (layer,) * dimensions.layers
    return Shape(layers, resident, resident - embedding, 0, kv, 0, packed, packed)


def rates(memory: float, upload: float, drive: float = 3e9) -> Rates:
    return Rates(drive, 1e-4, GPU_OVERHEAD, pcie=upload, in_place=IN_PLACE * upload, vram=memory)


Q4, BF16 = shape_of("qwen3.6-35b", "q4_k"), shape_of("qwen3-30b", "bf16")


def speed(shape: Shape, found: Hits, machine: Rates, context: int) -> float:
    return 1 / decode_times(shape, found, machine, context).total


def decode_row(name: str, shape: Shape, decode: dict[str, Any], drive: float) -> Row:
    """With the shares of lookups that its tiers served."""
    counters = [done["counters"] for done in decode["rounds"]]
    sums = [sum(c[tier] for c in counters) for tier in ("hot", "warm", "cold")]
    found = Hits(*(number / sum(sums) for number in sums))
    machine = rates(decode["memory_bandwidth"], decode["upload_bandwidth"], drive)
    predicted = speed(shape, found, machine, decode["plan"]["prompt"])
    return Row(name, predicted, decode["tokens_per_second"]["median"])


def from_store(name: str, file: str, shape: Shape) -> Row:
    """What was read came at the rate that its own reads had."""
    decode, stats = result(file), result(file)["stats"]
    return decode_row(name, shape, decode, stats["counters"]["read_bytes"] / stats["read_seconds"])


def lanes_row(name: str, mode: str) -> Row:
    """The hit rates are the seed's, since the result does not state them; memory and bus are those
    of another result of that day and card."""
    found, other = result("gpu_lanes"), result("gpu_decode_35b_q4_k_vram20_2048_h200")
    machine = rates(other["memory_bandwidth"], other["upload_bandwidth"])
    row, whole = found["modes"][mode], Q4.expert_bytes
    machine = replace(machine, in_place=row["bytes_per_second"]["median"])
    served = hits(Tiers(whole // 100, whole), whole, routing.seed(256, 8))
    return Row(name, speed(Q4, served, machine, PROMPT), row["tokens_per_second"]["median"])


def disk_row(name: str) -> Row:
    found = result("gpu_disk")
    return decode_row(name, Q4, found["decode"], sum(found["drive"]) / 2)


CALIBRATION = [
    from_store("35B q4_k, all in VRAM", "gpu_decode_35b_q4_k", Q4),
    from_store("35B q4_k, all in VRAM, `--exact`", "gpu_decode_35b_q4_k_exact", Q4),
    from_store("30B bf16, all in VRAM", "gpu_decode_30b_bf16", BF16),
]
"""What `GPU_OVERHEAD` was taken from."""

RIGHT = [
    from_store("35B q4_k, 20 % in VRAM", "gpu_decode_35b_q4_k_vram20_2048", Q4),
    from_store("H200: 35B q4_k, all in VRAM", "gpu_decode_35b_q4_k_h200", Q4),
    from_store("H200: 35B q4_k, all in VRAM, `--exact`", "gpu_decode_35b_q4_k_exact_h200", Q4),
    from_store("H200: 30B bf16, all in VRAM", "gpu_decode_30b_bf16_h200", BF16),
    from_store(
        "H200 (16 cores): 35B q4_k, 20 % in VRAM", "gpu_decode_35b_q4_k_vram20_h200_rates", Q4
    ),
    lanes_row("H200: 35B q4_k, 1 % in VRAM, GPU reads RAM", "gpu"),
    lanes_row("H200: 35B q4_k, 1 % in VRAM, CPU computes in RAM", "cpu"),
    lanes_row("H200: 35B q4_k, 1 % in VRAM, both", "auto"),
]

WRONG = [
    from_store(
        "H200 (16 cores, a slower host): 35B q4_k, 20 % in VRAM",
        "gpu_decode_35b_q4_k_vram20_h200_rates_2",
        Q4,
    ),
    from_store("H200: 35B q4_k, 20 % in VRAM", "gpu_decode_35b_q4_k_vram20_2048_h200", Q4),
    from_store(
        "H200: 35B q4_k, 20 % in VRAM, `--exact`", "gpu_decode_35b_q4_k_vram20_exact_h200", Q4
    ),
    from_store("35B q4_k, 20 % in VRAM, `-ub 8192`", "gpu_decode_35b_q4_k_vram20_8192", Q4),
    from_store("35B q4_k, 20 % in VRAM, `--exact`", "gpu_decode_35b_q4_k_vram20", Q4),
    from_store("35B q4_k, 20 % of the layers in VRAM", "gpu_decode_35b_q4_k_layers", Q4),
    disk_row("H200: 35B q4_k, 4 GiB of VRAM and of RAM"),
]
"""docs/plan.md says why."""


@pytest.mark.parametrize("row", CALIBRATION + RIGHT, ids=lambda row: row.name)
def test_predictions_are_within_a_fifth(row: Row) -> None:
    assert abs(row.error) <= 0.2


@pytest.mark.parametrize("row", CALIBRATION + RIGHT + WRONG, ids=lambda row: row.name)
def test_the_document_says_what_comes_out(row: Row) -> None:
    assert row.text in (ROOT / "docs" / "plan.md").read_text()
