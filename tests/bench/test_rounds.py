"""The figures of a run: the bound's arithmetic, shares, and what is counted per token."""

import json

import pytest

from tierrun.bench.decode import DecodeRun
from tierrun.bench.report import document, spread
from tierrun.bench.rounds import ROWS, RUNTIME_BYTES, Round, spreads
from tierrun.tiers.ledger import Counters, LayerTiming, bound_seconds

TIMINGS = [
    # step, layer, tokens, resident, hits, misses, wait, bytes
    LayerTiming(1, 0, 1, 0.010, 0.020, 0.005, 0.030, 50),  # 0.05 s of reads at 1000 bytes/s
    LayerTiming(1, 1, 1, 0.010, 0.040, 0.000, 0.000, 20),
    LayerTiming(1, 2, 1, 0.005, 0.000, 0.000, 0.000, 0),
]


def _round(bandwidths: tuple[float, float] = (900.0, 1100.0)) -> Round:
    counters = Counters(warm=12, cold=4, read_bytes=70, wait_seconds=0.03, ahead_useful=2)
    run = DecodeRun(0.5, [0.1, 0.05], counters, TIMINGS, 1.5, 10, 1000, 2000, 3000)
    return Round(run, 1 << 19, bandwidths)


def test_the_bounds() -> None:
    blind, foresighted = bound_seconds(TIMINGS, 1000.0)
    assert blind == pytest.approx((0.010 + 0.05) + (0.010 + 0.04) + 0.005)
    assert foresighted == pytest.approx(max(0.07, 0.025 + 0.06 + 0.005))


def test_the_figures() -> None:
    figures = _round().figures()
    assert figures["tokens_per_second"] == pytest.approx(2 / 0.15)
    assert figures["bound_no_foresight"] == pytest.approx(0.115 / 2)
    assert figures["ratio_no_foresight"] == pytest.approx(0.15 / 0.115)
    assert figures["ratio_foresight"] == pytest.approx(0.15 / 0.09)
    assert figures["other_seconds"] == pytest.approx((0.15 - 0.025 - 0.06 - 0.005 - 0.03) / 2)
    assert figures["wait_share"] == pytest.approx(0.2)
    assert figures["hit_share"] == pytest.approx(0.75)
    assert figures["cold"] == 2 and figures["read_bytes"] == 35
    assert figures["rss_limit"] == 1000 + 2000 + RUNTIME_BYTES


def test_every_row_of_the_table_has_a_figure() -> None:
    figures = spreads([_round(), _round((500.0, 500.0))])
    for _, name, scale, digits in ROWS:
        assert figures[name].text(digits, scale)


def test_a_run_survives_json() -> None:
    run = _round().run
    assert DecodeRun.from_json(run.to_json()) == run


def test_median_and_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert spread([1.234, 1.0, 2.0]).text() == "1.23 (1.00–2.00)"


def test_a_document_says_where_it_comes_from() -> None:
    result = json.loads(json.dumps(document("reads", {"verdict": {"good": True}})))
    assert {"benchmark", "command", "commit", "machine", "verdict"} <= result.keys()
    assert result["command"].startswith("python -m tierrun.bench.reads")
    assert result["machine"]["cores"] >= 1
    assert "torch" in result["machine"]["packages"]
