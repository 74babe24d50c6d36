"""`tierrun bench model`: what is measured, what is counted, and that the numbers agree."""

import json
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
from tests.bench.conftest import Run, refused

from tierrun.bench.devices import Setting, bytes_per_token
from tierrun.bench.documents import read_document
from tierrun.bench.model_bench import Figures, Repetition, Runner, forget_usage, usage_curve
from tierrun.bench.model_bound import Rates, Traffic, bound_of, drive_bandwidth, traffic_of
from tierrun.bench.model_plan import Budgets, Case, Plan
from tierrun.bench.model_run import METRICS, mean_and_deviation
from tierrun.engine.engine import load
from tierrun.io.errors import UsageError
from tierrun.io.store import read_manifest
from tierrun.tiers.ledger import Counters

RATES = Rates(memory=100.0, upload=10.0, drive=1.0, flops=1000.0)


def plan(**words: Any) -> Plan:
    usual: dict[str, Any] = {
        "prompts": "8",
        "generated": "4",
        "depths": "0",
        "vram": "auto",
        "ram": "auto",
        "repetitions": 2,
        "learn": 4,
        "warm": True,
        "seconds": None,
    }
    return Plan.of(**usual | words)


# -- what is measured -------------------------------------------------------------------------


def test_tests_are_named_as_in_llama_bench() -> None:
    made = plan(prompts="512", generated="128,256", depths="0,4096")
    assert [test.name for test in made.tests] == [
        *("pp512", "tg128", "tg256"),
        *("pp512 @ d4096", "tg128 @ d4096", "tg256 @ d4096"),
    ]
    assert made.context == 4096 + 512 + 2
    assert [test.kind for test in plan(prompts="0").tests] == ["tg"]


def test_every_pair_of_budgets() -> None:
    made = plan(vram="1GiB, 2GiB", ram="auto,20%experts,auto")
    assert made.budgets == (
        *(Budgets("1GiB", "auto"), Budgets("1GiB", "20%experts")),
        *(Budgets("2GiB", "auto"), Budgets("2GiB", "20%experts")),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompts": "8,x"}, "-p 8,x: write numbers"),
        ({"generated": "-1"}, "-n -1"),
        ({"depths": ""}, "-d"),
        ({"ram": "1GiB,,2GiB"}, "--ram"),
        ({"prompts": "0", "generated": "0"}, "no test is left"),
        ({"seconds": 0.0}, "--duration 0"),
    ],
)
def test_words_that_are_not_understood(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**words)


def test_repetitions_go_on_where_the_stream_was(synthetic: Path) -> None:
    made = plan(prompts="6", generated="5", depths="0,7", repetitions=3)
    file = synthetic / "store" / "usage.json"
    usage = file.read_bytes() if file.exists() else None
    with load(synthetic / "store", ram="400KiB", device="cpu") as engine:
        runner = Runner(engine, "cpu", made)
        fed = list[list[int]]()
        take = runner._next

        def noted(depth: int, tokens: int) -> tuple[list[int], list[int]]:
            behind, own = take(depth, tokens)
            assert len(behind) == depth and len(own) == tokens
            fed.append(own)
            return behind, own

        runner._next = noted  # type: ignore[method-assign]
        runner.learn()
        runs = {test.name: runner.run(test) for test in made.tests}
        forget_usage(engine)
    layers, start = 2, max(test.depth for test in made.tests)
    flat = [token for own in fed for token in own]
    assert runner._stream[start : start + len(flat)] == flat
    assert len(flat) <= made.stream - start
    assert all(len(done) == 3 for done in runs.values())
    for done in runs["tg5"] + runs["tg5 @ d7"]:
        assert (done.tokens, done.passes) == (5, 5)
        assert done.counters.lookups == 5 * layers * 2
    assert all(done.passes == 1 and done.tokens == 6 for done in runs["pp6"])
    assert (file.read_bytes() if file.exists() else None) == usage


def test_no_repetition_begins_after_its_time(synthetic: Path) -> None:
    made = plan(prompts="0", repetitions=50, seconds=1e-9)
    with load(synthetic / "store", ram="400KiB", device="cpu") as engine:
        runner = Runner(engine, "cpu", made)
        assert len(runner.run(made.tests[0])) == 1
        forget_usage(engine)


def test_nothing_goes_before_without_warm_up(synthetic: Path) -> None:
    made = plan(prompts="0", warm=False, repetitions=1)
    assert made.learn == 0
    with load(synthetic / "store", ram="400KiB", device="cpu") as engine:
        runner = Runner(engine, "cpu", made)
        runner.learn()
        (done,) = runner.run(made.tests[0])
        assert done.counters == engine.ledger.snapshot()
        curve = usage_curve(engine, (0.0, 50.0, 100.0))
        forget_usage(engine)
    assert curve[0] == 0 and 0.5 < curve[1] <= 1 and curve[2] == pytest.approx(1)


# -- the bound --------------------------------------------------------------------------------


def test_the_slowest_way_is_the_bound() -> None:
    assert bound_of(Traffic(50, 4, 0, 0), RATES) == (0.5, "memory")
    assert bound_of(Traffic(50, 6, 0, 0), RATES) == (0.6, "bus")
    assert bound_of(Traffic(50, 6, 0.7, 0), RATES) == (0.7, "drive")
    assert bound_of(Traffic(50, 6, 0.7, 800), RATES) == (0.8, "arithmetic")


def test_a_token_reads_its_experts_and_every_resident_weight(synthetic: Path) -> None:
    manifest = read_manifest(synthetic / "store")
    counters = Counters(warm=3, cold=1, read_bytes=70)  # two layers, top-2
    traffic = traffic_of(manifest, 512, 1, 1, counters, "cpu")
    assert traffic.memory == pytest.approx(bytes_per_token(manifest))
    assert (traffic.bus, traffic.drive) == (0, 70)
    dense = sum(r.shape[0] * r.shape[1] for r in manifest.residents if _is_product(r.shape))
    record = manifest.classes[0]
    experts = 4 * sum(m.shape[0] * m.shape[1] for m in record.matrices)
    assert traffic.flops == 2 * (dense + experts)


def _is_product(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and 512 not in shape


def test_what_crosses_the_bus_is_not_read_in_vram(synthetic: Path) -> None:
    manifest = read_manifest(synthetic / "store")
    counters = Counters(hot=2, warm=2, zero_copy_bytes=1000, computed_bytes=500, promoted_bytes=70)
    traffic = traffic_of(manifest, 512, 1, 1, counters, "cuda:0")
    assert traffic.bus == 1070
    assert traffic.memory == pytest.approx(bytes_per_token(manifest) - 1500)


def test_figures_of_a_repetition(synthetic: Path) -> None:
    with load(synthetic / "store", ram="400KiB", device="cpu") as engine:
        runner = Runner(engine, "cpu", plan())
        counters = Counters(hot=2, warm=5, cold=1, read_bytes=80)
        rates = Rates(memory=1e9, upload=1e9, drive=100.0, flops=1e15)
        told = runner.told(Repetition(2, 4.0, counters, 2), rates)
    assert told.by == "drive"
    figures = told.figures
    assert figures == Figures(0.5, 0.25, 0.625, 0.125, 40.0, 0.0, 2.5, pytest.approx(0.2))
    assert Figures._fields == tuple(metric.name for metric in METRICS)


def test_the_drive_gives_something(synthetic: Path) -> None:
    assert drive_bandwidth([synthetic / "store"], 0.01) > 0
    with pytest.raises(UsageError, match="is not a store"):
        drive_bandwidth([synthetic], 0.01)


# -- the command ------------------------------------------------------------------------------


def test_mean_and_deviation() -> None:
    assert mean_and_deviation([1.0, 2.0, 4.0]) == f"2.33 ± {statistics.stdev([1, 2, 4]):.2f}"
    assert mean_and_deviation([3.0]) == "3.00 ± 0.00"


QUICK = ("-p", 8, "-n", 4, "--device", "cpu", "--learn", 4)


def test_end_to_end(run: Run, synthetic: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    files = ("--csv", tmp_path / "t.csv", "--md", tmp_path / "t.md", "--plot", tmp_path / "t.png")
    budgets = ("--ram", "100KiB,400KiB,1KiB", "-d", "0,8", "-r", 4)
    code, printed, error = run(
        "model", synthetic / "store", *QUICK, *budgets, "--json", old, *files
    )
    assert code == 0, error
    assert "pp8 @ d8" in printed and "% of bound" in printed and "±" in printed
    assert "left out: --vram auto --ram 1KiB" in " ".join(printed.split())
    saved = read_document(old).results
    assert [c.key["test"] for c in saved.cells] == 2 * ["pp8", "tg4", "pp8 @ d8", "tg4 @ d8"]
    for cell in saved.cells:
        for hot, warm, cold in zip(
            *(cell.samples[n] for n in ("hot", "warm", "cold")), strict=True
        ):
            assert hot + warm + cold == pytest.approx(1)
        pairs = zip(*(cell.samples[n] for n in ("tokens_per_second", "bound")), strict=True)
        shares = cell.samples["share_of_bound"]
        assert shares == pytest.approx([speed / bound for speed, bound in pairs])
    by_ram = {c.key["ram"]: statistics.mean(c.samples["cold"]) for c in saved.cells}
    assert by_ram["400KiB"] < by_ram["100KiB"], "a larger budget must hit more often"
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert (tmp_path / "t.md").read_text().startswith("checkpoint (")
    assert json.loads(old.read_text())["command"].startswith("tierrun bench model")
    code, printed, error = run(
        "model", synthetic / "store", *QUICK, *budgets, "--json", new, "--compare", old
    )
    assert code == 0, error
    assert "verdict" in printed
    code, printed, error = run("compare", old, new, "--metric", "cold")
    assert code == 0 and "cold %: median" in printed, error


def test_what_was_measured_survives_the_end(
    run: Run, synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the second test: the first is delivered, and the exit code is the signal's."""
    whole = Runner.run

    def ends(self: Runner, test: Case) -> list[Repetition]:
        if test.kind == "tg":
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, test)

    monkeypatch.setattr(Runner, "run", ends)
    file = tmp_path / "part.json"
    store = synthetic / "store"
    code, printed, error = run("model", store, *QUICK, "--ram", "400KiB", "--json", file)
    assert code == 128 + signal.SIGTERM, error
    assert "told to end before all was measured" in printed
    assert [cell.key["test"] for cell in read_document(file).results.cells] == ["pp8"]


def test_refusals_are_one_line(run: Run, synthetic: Path, tmp_path: Path) -> None:
    store = synthetic / "store"
    assert "no such directory" in refused(run, "model", tmp_path / "none", *QUICK)
    assert "is not a store" in refused(run, "model", tmp_path, *QUICK)
    assert "not a budget" in refused(run, "model", store, *QUICK, "--ram", "foo%")
    assert "-d x: write numbers" in refused(run, "model", store, *QUICK, "-d", "x")
    assert "--device foo" in refused(run, "model", store, "--device", "foo")
    assert "tg4 @ d99999: this model's context" in refused(
        run, "model", store, "-p", 0, "-n", 4, "-d", 99999, "--device", "cpu"
    )


def test_a_setting_may_name_several_drives(synthetic: Path) -> None:
    with Setting("cpu", "0", "400KiB").load(synthetic / "store") as engine:
        assert engine.device.type == "cpu"
    assert Case("tg", 4, 0).end == 6
