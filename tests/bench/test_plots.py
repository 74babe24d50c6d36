"""Which line of a plot a cell is drawn in."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tierrun.bench.cells import Cell, Metric, Value
from tierrun.bench.plots import _panels
from tierrun.bench.sheets import show, split_keys

RATE = Metric("bandwidth", "GB/s", 1e-9, 2, True)


def panels(keys: Sequence[dict[str, Value]]) -> dict[tuple[str, str], list[tuple[str, list[Cell]]]]:
    cells = [Cell(key, {"bandwidth": (1.0,)}) for key in keys]
    found = _panels(cells, split_keys(keys)[1])
    return {panel: [(line.label, line.cells) for line in lines] for panel, lines in found.items()}


@given(
    keys=st.lists(
        st.fixed_dictionaries(
            {
                "device": st.sampled_from(["cpu", "cuda"]),
                "codec": st.sampled_from(["bf16", "q4_k"]),
                "tokens": st.integers(1, 3),
                "threads": st.integers(1, 3),
            }
        ),
        min_size=1,
        unique_by=lambda key: tuple(sorted(key.items())),
    )
)
def test_every_cell_is_a_point_of_one_line(keys: list[dict[str, Value]]) -> None:
    found = panels(keys)
    drawn = [cell.key for lines in found.values() for _, cells in lines for cell in cells]
    assert sorted(map(str, drawn)) == sorted(map(str, keys))
    for (_, along), lines in found.items():
        assert len({label for label, _ in lines}) == len(lines)
        for _, cells in lines:
            assert len({cell.key[along] for cell in cells}) == len(cells)
            assert len({cell.key["codec"] for cell in cells}) == 1


def test_reads_by_threads_stand_beside_copies_by_size() -> None:
    reads: list[dict[str, Value]] = [
        {"test": "read", "bytes": 1 << 30, "threads": threads} for threads in (1, 2)
    ]
    copies: list[dict[str, Value]] = [
        {"test": "copy", "bytes": nbytes, "threads": "-"} for nbytes in (64, 128)
    ]
    found = panels([*reads, *copies])
    assert {panel: [label for label, _ in lines] for panel, lines in found.items()} == {
        ("", "threads"): ["read"],
        ("", "bytes"): ["copy"],
    }


def test_sizes_are_shown_as_they_are_written() -> None:
    assert [show("bytes", n) for n in (64 << 10, 1 << 20, 1 << 30, 1820000)] == [
        "64 KiB",
        "1 MiB",
        "1 GiB",
        "1.82 MB",
    ]
