"""`tierrun bench pipeline`: the engine's own tiers, fed without a model."""

from pathlib import Path

import pytest
import torch
from tests.bench.conftest import Run, refused

from tierrun.bench.documents import read_document
from tierrun.bench.pipeline_load import LOADS, Feeder, WorkingSet
from tierrun.bench.pipeline_plots import plot_pipeline
from tierrun.bench.pipeline_run import METRICS, Request, run_pipeline
from tierrun.bench.pipeline_tiers import PipelinePath, Sizes, TimedCopies, open_path
from tierrun.engine.options import Options
from tierrun.io.store import Store
from tierrun.tiers.budget import smallest_budget
from tierrun.tiers.copies import HostCopies

CPU = torch.device("cpu")


@pytest.fixture
def store(synthetic: Path) -> Store:
    return Store.open([synthetic / "store"])


def test_a_working_set_has_experts_of_every_layer(store: Store) -> None:
    record = store.manifest.classes[0].nbytes
    some = WorkingSet.of(store.manifest, 2 * 6 * record)
    assert [len(set(layer)) for layer in some.layers] == [6, 6]
    assert some.nbytes == 12 * record
    assert [len(layer) for layer in WorkingSet.of(store.manifest, 0).layers] == [3, 3]
    assert [len(layer) for layer in WorkingSet.of(store.manifest, 1 << 40).layers] == [16, 16]


@pytest.mark.parametrize("path", PipelinePath)
@pytest.mark.parametrize("load", LOADS)
def test_what_comes_is_what_was_asked_for(store: Store, path: PipelinePath, load: str) -> None:
    """Lookups, bytes and hits agree with the ledger, and every part of the time is one."""
    working_set = WorkingSet.of(store.manifest, 1 << 40)
    small = 2 * smallest_budget(store.manifest)
    sizes = Sizes(small, small, working_set.nbytes)
    record = store.manifest.classes[0].nbytes
    with open_path(path, store, Options(device="cpu"), sizes, CPU) as tiers:
        feeder = Feeder(tiers, working_set)
        feeder.warm_up()
        before = tiers.ledger.snapshot()
        done = feeder.run(load, 0.0)
        counted = tiers.ledger.snapshot() - before
        if tiers.vram is not None:
            tiers.vram.check_integrity()
        else:
            tiers.residency.check_integrity()
    assert counted.lookups == (2 * 2 if load == "decode" else 2 * 16)
    assert done.reads + done.copies + done.host == pytest.approx(1)
    came = counted.read_bytes if path is PipelinePath.READ else counted.promoted_bytes
    assert came % record == 0
    hits = counted.warm if path is PipelinePath.READ else counted.hot
    assert came == (counted.lookups - hits) * record
    assert done.hit == hits / counted.lookups
    assert done.bandwidth > 0
    if path is PipelinePath.COPY:
        assert counted.read_bytes == 0, "RAM has everything"


def test_each_is_asked_for_once_before_any_is_again(store: Store) -> None:
    working_set = WorkingSet.of(store.manifest, 1 << 40)
    sizes = Sizes(0, 2 * smallest_budget(store.manifest), working_set.nbytes)
    with open_path(PipelinePath.READ, store, Options(device="cpu"), sizes, CPU) as tiers:
        feeder, asked = Feeder(tiers, working_set), list[int]()
        lease = tiers.residency.lease

        def noted(layer: int, experts: list[int]) -> object:
            asked.extend(experts if layer == 0 else [])
            return lease(layer, experts)

        tiers.residency.lease = noted  # type: ignore[method-assign, assignment]
        for _ in range(16):
            feeder.run("decode", 0.0)
    assert sorted(asked[:16]) == sorted(asked[16:]) == list(range(16))


def test_time_in_copies_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Slow(HostCopies):
        def synchronize(self) -> None:
            now[0] += 2.0

    monkeypatch.setattr("tierrun.bench.pipeline_tiers.time.perf_counter", lambda: now[0])
    copies = TimedCopies(Slow())
    copies.to_device([(torch.zeros(1), torch.ones(1))]).wait()
    copies.synchronize()
    assert copies.waited == 2.0


def test_all_paths_with_a_stand_in(synthetic: Path, tmp_path: Path) -> None:
    request = Request(
        (synthetic / "store",), CPU, Options(device="cpu"), rounds=2, seconds=0.0, stand_in=True
    )
    results, sheets = run_pipeline(request)
    assert [(c.key["path"], c.key["load"]) for c in results.cells] == [
        (str(path), load) for path in PipelinePath for load in LOADS
    ]
    for cell in results.cells:
        assert set(cell.samples) == {metric.name for metric in METRICS}
        pairs = zip(cell.samples["bandwidth"], cell.samples["bound"], strict=True)
        assert cell.samples["share_of_bound"] == pytest.approx([x / y for x, y in pairs])
    bounds = {cell.key["path"]: cell.samples["bound"] for cell in results.cells}
    copies = bounds["RAM → VRAM"][0]
    assert all(bound <= copies for bound in bounds["NVMe → RAM → VRAM"])
    assert len(sheets[0].rows) == 6
    plot_pipeline(results, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_end_to_end(run: Run, synthetic: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    quick = ("pipeline", synthetic / "store", "--device", "cpu", "--duration", 0.01, "--rounds", 4)
    code, printed, error = run(*quick, "--json", old, "--plot", tmp_path / "p.png")
    assert code == 0, error
    assert "NVMe → RAM" in printed and "% of bound" in printed and "no GPU here" in printed
    assert [c.key["load"] for c in read_document(old).results.cells] == list(LOADS)
    code, printed, error = run(*quick, "--compare", old)
    assert code == 0 and "verdict" in printed, error


def test_refusals_are_one_line(run: Run, synthetic: Path, tmp_path: Path) -> None:
    store = synthetic / "store"
    assert "is not a store" in refused(run, "pipeline", tmp_path, "--device", "cpu")
    assert "--duration 0" in refused(run, "pipeline", store, "--duration", 0)
    assert "foo" in refused(run, "pipeline", store, "--size", "foo")
    assert "smallest budget" in run("pipeline", store, "--device", "cpu", "--ram", "4KiB")[2]
