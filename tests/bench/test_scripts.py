"""The benchmarks at toy size: that they run and what they measure adds up, not how fast it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tierrun.bench import (
    decode,
    fio,
    gds,
    gpu_arbiter,
    gpu_decode,
    gpu_parity,
    gpu_soak,
    gpu_timeline,
    kernels_matmul,
    offloaded,
    reads,
)
from tierrun.bench.demand import Arm, Demander, open_queue
from tierrun.engine.engine import load
from tierrun.io.store import Store

MAINS: dict[str, Callable[..., None]] = {
    "decode": decode.main,
    "gds": gds.main,
    "gpu_arbiter": gpu_arbiter.main,
    "gpu_decode": gpu_decode.main,
    "gpu_parity": gpu_parity.main,
    "gpu_soak": gpu_soak.main,
    "gpu_timeline": gpu_timeline.main,
    "kernels_matmul": kernels_matmul.main,
    "offloaded": offloaded.main,
    "reads": reads.main,
}


@pytest.mark.parametrize("name", MAINS)
def test_help(name: str) -> None:
    app = typer.Typer()
    app.command()(MAINS[name])
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert MAINS[name].__doc__
    assert "Usage" in result.output


@pytest.mark.parametrize("lookahead", [True, False])
def test_decode_counts_the_measured_tokens_only(synthetic: Path, lookahead: bool) -> None:
    with load(synthetic / "store", ram="200KiB", lookahead=lookahead) as engine:
        run = decode.decode(engine, 0.0, warmup=3, tokens=4, prompt=8)
        layers = len(engine.store.manifest.layers)
    assert len(run.seconds) == 4 and min(run.seconds) > 0
    assert run.counters.lookups == 4 * layers * 2
    assert len(run.timings) == 4 * (layers + 1)
    assert {timing.tokens for timing in run.timings} == {1}
    assert sum(timing.wait for timing in run.timings) <= run.total_seconds
    assert run.record_bytes % 4096 == 0
    assert run.prompt_tokens == 8 and run.prompt_seconds > 0
    assert run.peak_rss > 1 << 20


def test_the_stream_decides_not_the_sampler(synthetic: Path) -> None:
    runs = []
    for lookahead in (True, False):
        with load(synthetic / "store", ram="400KiB", lookahead=lookahead) as engine:
            runs.append(decode.decode(engine, 0.0, warmup=2, tokens=6))
    assert runs[0].counters.lookups == runs[1].counters.lookups


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_demand_reads(synthetic: Path, batch: int) -> None:
    store = Store.open([synthetic / "store"])
    shard = store.manifest.layers[0].records[0].shard
    with open_queue(store, "direct", depth=4, part_bytes=4096) as queue:
        demander = Demander(store, queue, shard)
        first = demander.read_each_once()
        assert queue.figures().records == 32
        reading = demander.run(Arm(batch), seconds=0.05)
    assert first.bandwidth > 0 and reading.bandwidth > 0
    assert reading.mean_depth >= 1
    assert queue.figures().retries == 0


@pytest.mark.skipif(fio.obstacle() is not None, reason=str(fio.obstacle()))
def test_fio(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    result = fio.direct_reads(path, block_bytes=65536, depth=2, seconds=0.2)
    assert result.bandwidth > 0


@pytest.mark.skipif(fio.obstacle() is not None, reason=str(fio.obstacle()))
def test_reads_end_to_end(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results" / "reads.json"
    reads.main(synthetic / "store", 4, 4096, "direct", 1, 0.1, "2", file)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads(file.read_text())
    assert set(last["arms"]) == {"saturating", "batches of 2"}
    assert {"ours", "fio", "ratio", "mean_depth", "fio_depth"} <= last["arms"]["saturating"].keys()


def test_ways_from_the_drive(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without kvikio and without a GPU it is a table of direct reads, and says why."""
    file = tmp_path / "gds.json"
    gds.main(synthetic / "store", "cpu", "1,2", 0.02, file)
    printed = capsys.readouterr().out
    assert "direct → RAM" in printed and "no reads into VRAM" in printed
    result = json.loads(file.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    cells = [cell for cell in result["cells"] if cell["reader"] == "direct"]
    assert [cell["depth"] for cell in cells] == [1, 2]
    assert all(cell["bandwidth"] > 0 and cell["target"] == "host" for cell in cells)
    assert result["chosen"]["to_device"] == "staged"


@pytest.mark.parametrize("map_", list(offloaded.Map))
def test_accelerate(synthetic: Path, tmp_path: Path, map_: offloaded.Map) -> None:
    pytest.importorskip("accelerate")
    model = offloaded.load(synthetic / "checkpoint", tmp_path, map_, "150KB", "batched_mm")
    assert "disk" in map(str, model.hf_device_map.values())
    seconds, _ = offloaded.decode(model, warmup=3, tokens=2)
    assert len(seconds) == 2
