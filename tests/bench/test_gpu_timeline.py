"""What a timeline says, from spans that can be counted by hand."""

import json
from pathlib import Path

import pytest
from tests.clocks import CountingClock

from tierrun.bench import devices, gpu_timeline
from tierrun.bench.devices import Setting
from tierrun.bench.gpu_timeline import (
    ROWS,
    WORK,
    Kind,
    Take,
    Taken,
    figures,
    kinds,
    measure,
    results,
)
from tierrun.io.errors import UsageError
from tierrun.io.timeline import ASIDE, DOWN, EXPERTS, HOST, REST, UP, Span

MS = 1e-3


def span(track: str, name: str, start: float, end: float, nbytes: int = 0) -> Span:
    """Of milliseconds."""
    return Span(track, name, start * MS, end * MS, nbytes)


TAKE = Take(
    1000 * MS,
    1100 * MS,
    [
        span(REST, "layer 0: before its experts", 1005, 1020),
        span(EXPERTS, "layer 0: 16 experts", 1040, 1060),
        span(EXPERTS, "layer 1: 12 experts", 1060, 1090),
        span(UP, "1 records", 1010, 1030, 1_000_000),
        span(UP, "1 records", 1030, 1050, 1_000_000),
        span(ASIDE, "2 records", 1095, 1105, 2_000_000),
        span(DOWN, "1 records", 1090, 1092, 1_000_000),
        span(HOST, "layer 0: streams 28 experts", 1000, 1100),
    ],
    error=5e-6,
)


def at(wall: float) -> Take:
    """Another take, of which only the wall time counts."""
    return Take(0.0, wall * MS, [])


WORK_TAKEN = Taken([0.080, 0.090, 0.500], [at(300), TAKE, at(20)])


def test_figures_are_of_the_median_take() -> None:
    found = figures(WORK_TAKEN, upload=100e6)
    assert set(found) == {key for key, *_ in ROWS}
    assert found == pytest.approx(
        {
            "wall_ms": 100,
            "unrecorded_wall_ms": 90,
            "up_mb": 4,
            "up_busy": 45,
            "up_behind_compute": 100 * 20 / 45,
            "up_rate_busy": 0.004 / 0.050,
            "up_share_busy": 80,
            "up_rate_wall": 0.040,
            "up_share_wall": 40,
            "up_rate_unrecorded": 0.004 / 0.090,
            "up_share_unrecorded": 100 * 40 / 90,
            "compute_busy": 65,
            "idle": 5 + 3,
        }
    )


def test_kinds_are_names_without_their_numbers() -> None:
    found = kinds(TAKE)
    assert list(found) == [
        "GPU: the rest, layer N: before its experts",
        "copies up, N records",
        "GPU: experts, layer N: N experts",
        "copies down, N records",
        "copies aside, N records",
        "no compute, copies under way",
        "nothing to do",
    ]
    assert found["GPU: experts, layer N: N experts"] == pytest.approx(Kind(2, 50, 25, 30))
    assert found["no compute, copies under way"] == pytest.approx(Kind(3, 27, 5, 20))
    assert found["nothing to do"] == pytest.approx(Kind(2, 8, 4, 5))


def test_the_document_and_the_tables_hold_both(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(json.dumps(results(WORK_TAKEN, 100e6)))
    assert document["wall_ms"] == pytest.approx([300, 100, 20])
    assert document["unrecorded_wall_ms"] == pytest.approx([80, 90, 500])
    assert document["clock_error_us"] == pytest.approx(5)
    assert document["kinds"]["nothing to do"]["times"] == 2
    gpu_timeline.show({"prefill": WORK_TAKEN, "a token": WORK_TAKEN}, 100e6)
    printed = capsys.readouterr().out
    assert "a token: what the GPU did" in printed and all(label in printed for _, label, _ in ROWS)


def test_a_chunk_and_tokens_are_taken_in_turn(synthetic: Path) -> None:
    with Setting("cpu", "50%experts", "1GiB", context=128, ubatch=16).load(
        synthetic / "store"
    ) as engine:
        found = measure(engine, "cpu", CountingClock(), ubatch=16, rounds=2, tokens=3)
    assert list(found) == ["prefill of 16 tokens", "a token"]
    for work, times in zip(found.values(), (2, 3), strict=True):
        assert len(work.unrecorded) == len(work.takes) == times
        assert all(take.of(WORK) == [take.spans[0]] for take in work.takes)
        assert work.median.error == 0.25
        assert figures(work, 1e9)["up_mb"] == figures(work, 1e9)["up_rate_busy"] == 0


def test_the_whole_script(
    synthetic: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the CPU's engine in place of a GPU's."""
    on_cpu = Setting("cpu", "50%experts", "1GiB", context=128, ubatch=32)
    bandwidths = devices.Bandwidths(1e12, 50e9)
    monkeypatch.setattr(devices, "check_device", lambda device: None)
    monkeypatch.setattr(devices, "measure_bandwidths", lambda device: bandwidths)
    monkeypatch.setattr(gpu_timeline, "synchronise", lambda device: None)
    monkeypatch.setattr(gpu_timeline, "CudaClock", lambda device: CountingClock())
    monkeypatch.setattr(gpu_timeline, "Setting", lambda *args, **named: on_cpu)
    out, document = tmp_path / "timeline.json", tmp_path / "figures.json"
    gpu_timeline.main(
        synthetic / "store", ubatch=32, rounds=1, tokens=1, out=out, json_file=document
    )
    found = json.loads(document.read_text())
    assert found["upload_bandwidth"] == 50e9
    assert list(found["works"]) == ["prefill of 32 tokens", "a token"]
    assert f"{out}: for https://ui.perfetto.dev" in capsys.readouterr().err
    rows = json.loads(out.read_text())["traceEvents"]
    assert [row["pid"] for row in rows if row["name"] == "all of it"] == [1, 2]


def test_a_cpu_has_no_timeline() -> None:
    with pytest.raises(UsageError, match="of a GPU"):
        gpu_timeline.main(Path("."), device="cpu")
