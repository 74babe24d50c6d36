"""Results in files, and two of them side by side: what changed, and what cannot be compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tierrun.bench.cells import Cell, Metric, Results
from tierrun.bench.compare import compare
from tierrun.bench.documents import Saved, read_document
from tierrun.bench.outputs import Outputs, show_comparison
from tierrun.bench.report import SCHEMA, document
from tierrun.bench.sheets import sheet_of, to_csv
from tierrun.io.errors import UsageError

RATE = Metric("bandwidth", "GB/s", 1e-9, 2, True)
LATENCY = Metric("p99", "p99 ms", 1e3, 2, False)


def results(
    samples: dict[int, Sequence[float]], benchmark: str = "io", directory: str = "/a", **more: Any
) -> Results:
    """Cells by depth, with these bandwidths in GB/s, and latencies that are their inverse."""
    cells = tuple(
        Cell(
            {"directory": directory, "bytes": 4096, "depth": depth},
            {"bandwidth": tuple(r * 1e9 for r in rates), "p99": tuple(1 / r for r in rates)},
        )
        for depth, rates in samples.items()
    )
    return Results(benchmark, (RATE, LATENCY), cells, {"rounds": 5}, ("a note",), **more)


def saved(name: str, found: Results, **machine: Any) -> Saved:
    made = document(found.benchmark, found.to_json(), ("tierrun",))
    made["machine"] |= machine
    return Saved.of(name, json.loads(json.dumps(made)))


SLOW, FAST = (1.0, 1.01, 0.99, 1.02, 1.0), (2.0, 2.01, 2.02, 1.99, 2.0)
NOISY, NOISIER = (1.0, 2.0, 3.0, 4.0, 5.0), (1.1, 2.4, 3.2, 4.6, 4.8)


def test_results_survive_their_document() -> None:
    found = results({1: SLOW, 4: FAST}, details={"more": [1]})
    made = json.loads(json.dumps(document("io", found.to_json())))
    assert Results.from_json(made) == found
    assert (made["schema"], made["benchmark"]) == (SCHEMA, "io")


def test_verdicts_follow_the_spread_not_the_medians() -> None:
    """A change of 7 % within noise is none; one of a factor of two without noise is."""
    old, new = results({1: SLOW, 2: FAST, 3: NOISY}), results({1: FAST, 2: SLOW, 3: NOISIER})
    found = compare(saved("old", old), saved("new", new))
    assert [change.verdict for change in found.changes] == ["better", "worse", "within the spread"]
    assert found.changes[0].p == pytest.approx(2 / 252, rel=0.5)
    latencies = compare(saved("old", old), saved("new", new), "p99")
    assert [change.verdict for change in latencies.changes][:2] == ["better", "worse"]
    assert any("Mann-Whitney" in note for note in found.notes)


def test_too_few_rounds_prove_nothing() -> None:
    old, new = results({1: SLOW[:3]}), results({1: FAST[:3]})
    found = compare(saved("old", old), saved("new", new))
    assert found.changes[0].verdict == "too few rounds"
    assert any("--rounds" in note for note in found.notes)


@given(
    rates=st.dictionaries(
        st.integers(1, 64), st.lists(st.floats(0.01, 100), min_size=1, max_size=7), min_size=1
    )
)
def test_nothing_changes_from_a_result_to_itself(rates: dict[int, list[float]]) -> None:
    once = saved("once", results(rates))
    found = compare(once, once)
    assert {change.verdict for change in found.changes} <= {"within the spread", "too few rounds"}
    assert {change.ratio for change in found.changes} == {1.0}
    assert len(found.changes) == len(rates)


@given(
    old=st.lists(st.floats(0.01, 100), min_size=4, max_size=7),
    new=st.lists(st.floats(0.01, 100), min_size=4, max_size=7),
)
def test_better_one_way_is_worse_the_other(old: list[float], new: list[float]) -> None:
    first, second = saved("first", results({1: old})), saved("second", results({1: new}))
    there, back = compare(first, second).changes[0], compare(second, first).changes[0]
    opposite = {"better": "worse", "worse": "better"}
    assert back.verdict == opposite.get(there.verdict, there.verdict)
    assert back.p == pytest.approx(there.p)


def test_a_directory_by_another_name_is_a_note() -> None:
    old, new = results({1: SLOW, 4: SLOW}), results({1: FAST, 8: FAST}, directory="/b")
    found = compare(saved("old", old), saved("new", new))
    assert [change.key["depth"] for change in found.changes] == [1]
    text = "\n".join(found.notes)
    assert "directory /a then, /b now" in text
    assert "1 cells only in old" in text and "1 cells only in new" in text


def test_cells_are_told_apart_by_what_differs_in_either() -> None:
    """One has one directory, the other two: the one is one of the two."""
    two = results({1: SLOW})
    two = Results(
        two.benchmark, two.metrics, two.cells + results({1: FAST}, directory="/b").cells, {}
    )
    found = compare(saved("old", results({1: SLOW}, directory="/b")), saved("new", two))
    assert [change.key["directory"] for change in found.changes] == ["/b"]


def test_another_machine_is_said() -> None:
    old, new = results({1: SLOW}), results({1: FAST})
    found = compare(saved("old", old, cpu="an abacus"), saved("new", new))
    assert any(note.startswith("another machine") and "abacus" in note for note in found.notes)
    found = compare(saved("old", old, kernel="1.0"), saved("new", new))
    assert any(note.startswith("other software") and "kernel 1.0" in note for note in found.notes)
    assert not any(note.startswith("another machine") for note in found.notes)


def test_what_has_nothing_in_common_is_refused() -> None:
    io = saved("old", results({1: SLOW}))
    with pytest.raises(UsageError, match="`io`, new of `copies`"):
        compare(io, saved("new", results({1: SLOW}, benchmark="copies")))
    with pytest.raises(UsageError, match="no cell in common"):
        compare(saved("old", results({1: SLOW, 2: SLOW})), saved("new", results({3: SLOW})))
    with pytest.raises(UsageError, match="no metric speed.*bandwidth, p99"):
        compare(io, io, "speed")


# -- files ------------------------------------------------------------------------------------


def test_a_written_result_can_be_read(tmp_path: Path) -> None:
    file, found = tmp_path / "new.json", results({1: SLOW, 2: FAST})
    sheet = sheet_of(found)
    outputs = Outputs(file, tmp_path / "new.csv", tmp_path / "new.md", None, None)
    outputs.deliver(found, [sheet], Console(quiet=True), outputs.check())
    assert read_document(file).results == found
    assert (tmp_path / "new.md").read_text().count("\n|") == 4
    assert "| 2 | 2.00 (1.99–2.02) |" in (tmp_path / "new.md").read_text()
    lines = (tmp_path / "new.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("directory,bytes,depth,bandwidth_median,")
    assert lines[1].startswith("/a,4096,1,1000000000.0,990000000.0,1020000000.0,")
    assert to_csv(found).splitlines() == lines


UNREADABLE = {
    "not json": ("{", "holds no results"),
    "a list": ("[1]", "holds no results"),
    "something else": ('{"a": 1}', "holds no results"),
    "before schemas": (
        '{"benchmark": "reads", "commit": "51d6fc97bb2d", "command": "python -m x"}',
        "before results had a schema .*51d6fc97bb2d.*make them again: python -m x",
    ),
    "newer": (
        f'{{"benchmark": "io", "schema": {SCHEMA + 1}, "tierrun": "9.0"}}',
        f"schema {SCHEMA + 1}, written by tierrun 9.0.*update tierrun",
    ),
    "a script's": (f'{{"benchmark": "reads", "schema": {SCHEMA}}}', "no cells to compare"),
    "damaged": (f'{{"benchmark": "io", "schema": {SCHEMA}, "cells": 3}}', "damaged"),
    "empty cell": (
        json.dumps(
            document("io", results({1: SLOW}).to_json())
            | {"cells": [{"key": {}, "samples": {"bandwidth": [], "p99": []}}]}
        ),
        "without samples",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_explained(kind: str, tmp_path: Path) -> None:
    text, message = UNREADABLE[kind]
    file = tmp_path / "old.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as raised:
        Outputs(compare_with=file).check()
    assert "\n" not in str(raised.value)


def test_results_of_older_tierruns_are_explained() -> None:
    """Those that lie in this repository from before there was a schema."""
    files = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json"))
    old = [file for file in files if "schema" not in json.loads(file.read_text())]
    for file in old:
        with pytest.raises(UsageError, match="holds no results|before results had a schema"):
            read_document(file)


def test_a_missing_file_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.json cannot be read: No such file"):
        read_document(tmp_path / "none.json")


def test_a_file_that_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        Outputs(json_file=tmp_path / "none" / "new.json").check()


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = results({1: SLOW, 4: FAST})
    outputs = Outputs(plot_file=tmp_path / "plot.png")
    outputs.deliver(found, [], Console(quiet=True), outputs.check())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="--plot"):
        Outputs(plot_file=tmp_path / "plot.xyz").deliver(found, [], Console(quiet=True), None)


def test_without_matplotlib_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'tierrun\[plot\]'"):
        Outputs(plot_file=Path("plot.png")).check()


def test_a_comparison_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(
        saved("old", results({1: SLOW, 4: SLOW})), saved("new", results({1: FAST, 4: SLOW}))
    )
    show_comparison(found, Console(width=120))
    printed = capsys.readouterr().out
    assert "+100.0 %" in printed and "better" in printed and "within the spread" in printed
