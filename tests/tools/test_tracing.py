"""What conversions do to rows and columns is found exactly, or not claimed at all."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierrun.io.errors import CheckpointError
from tierrun.tools.sources.source import Reads
from tierrun.tools.tracing import Grid, Selection, Tracer

Make = Callable[[Reads], torch.Tensor]


class Values:
    """Numbers that are all different, where conversions read."""

    def __init__(self, grids: dict[str, Grid]) -> None:
        self.grids, self.tensors, start = grids, {}, 0
        for name, grid in grids.items():
            count = grid.rows * grid.columns
            self.tensors[name] = torch.arange(start, start + count, dtype=torch.float64)
            self.tensors[name] = self.tensors[name].view(grid.shape)
            start += count

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        return self.tensors[name]

    def selected(self, selection: Selection) -> torch.Tensor:
        """The matrix that `selection` says."""
        names = list(self.grids)
        matrices = [
            self.tensors[name].movedim(grid.axis, -1).reshape(grid.rows, grid.columns)
            for name, grid in self.grids.items()
        ]
        pairs = zip(selection.tensors.tolist(), selection.rows.tolist(), strict=True)
        assert max(selection.tensors.tolist()) < len(names)
        rows = torch.stack([matrices[number][row] for number, row in pairs])
        return rows if selection.columns is None else rows[:, selection.columns]


def assert_traced(grids: dict[str, Grid], make: Make, *, in_order: bool = True) -> None:
    tracer, values = Tracer(), Values(grids)
    for _ in range(2):  # found, and then guessed
        selection = tracer.trace(grids, make)
        assert selection is not None
        assert (selection.columns is None) == in_order
        assert torch.equal(values.selected(selection), make(values))


TWO = {"a": Grid((6, 8), 1), "b": Grid((10, 8), 1)}
ONE = {"a": Grid((12, 8), 1)}
BATCH = {"a": Grid((1, 8, 12), 1)}


@pytest.mark.parametrize(
    "make",
    [
        lambda r: torch.cat([r.read("a"), r.read("b")]),
        lambda r: torch.cat([r.read("b"), r.read("a")[2:]]),
        lambda r: torch.stack([r.read("a"), r.read("b")[:6]], 1).flatten(0, 1),
        lambda r: r.read("b").view(5, 2, 8).transpose(0, 1).reshape(10, 8),
        lambda r: r.read("a").index_select(0, torch.tensor([5, 5, 0])),
    ],
)
def test_rows_of_two_tensors(make: Make) -> None:
    assert_traced(TWO, make)


def test_a_tensor_packed_along_an_inner_dimension() -> None:
    assert_traced(BATCH, lambda r: r.read("a")[0].T)
    assert_traced(BATCH, lambda r: r.read("a", 0)[0].T[::2])


def test_columns_in_another_order() -> None:
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    assert_traced(ONE, lambda r: r.read("a")[:, order], in_order=False)
    assert_traced(ONE, lambda r: r.read("a").flip(0)[:, order], in_order=False)


def test_more_rows_and_columns_than_a_byte_counts() -> None:
    grids = {"a": Grid((300, 70), 1), "b": Grid((70_000, 70), 1)}
    assert_traced(grids, lambda r: torch.cat([r.read("b")[65_000:], r.read("a").flip(0)]))
    assert_traced({"a": Grid((3, 700), 1)}, lambda r: r.read("a").flip(1), in_order=False)


def fails(labels: Reads) -> torch.Tensor:
    raise CheckpointError("an operation that wants floats")


@pytest.mark.parametrize(
    "make",
    [
        fails,
        lambda r: r.read("a").float(),
        lambda r: r.read("a") + 1,
        lambda r: r.read("a") * 2,
        lambda r: r.read("a").flip(0) & 127,
        lambda r: torch.maximum(r.read("a")[:6], r.read("a")[6:]),
        lambda r: torch.zeros_like(r.read("a")),
        lambda r: r.read("a").T,
        lambda r: r.read("a").reshape(6, 16),
        lambda r: r.read("a")[:, :4],
        lambda r: r.read("a")[:, [0, 0, 1, 2, 3, 4, 5, 6]],
        lambda r: torch.cat([r.read("a")[:6], r.read("a")[6:].flip(1)]),
        lambda r: r.read("a").flatten(),
        lambda r: r.read("a")[:0],
    ],
)
def test_anything_else_is_not_claimed(make: Make) -> None:
    assert Tracer().trace(ONE, make) is None


def test_tensors_of_different_widths_have_no_rows_in_common() -> None:
    grids = {"a": Grid((4, 8), 1), "b": Grid((4, 16), 1)}
    assert Tracer().trace(grids, lambda r: r.read("a")) is None


def test_a_guess_is_proved_before_it_is_believed() -> None:
    tracer = Tracer()
    for make in (lambda r: r.read("a"), lambda r: r.read("a").flip(0)):
        selection = tracer.trace(ONE, make)
        assert selection is not None
        assert torch.equal(Values(ONE).selected(selection), make(Values(ONE)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_chain_of_moves(data: st.DataObject) -> None:
    """Rows are cut, joined, permuted and interleaved, and columns permuted, in any order."""
    columns = data.draw(st.sampled_from([4, 8, 300]))
    heights = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    grids = {str(i): Grid((height, columns), 1) for i, height in enumerate(heights)}
    seeds = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))

    def make(source: Reads) -> torch.Tensor:
        matrix = torch.cat([source.read(name) for name in grids])
        for number, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(number)
            if seed == 0:
                matrix = matrix[torch.randperm(len(matrix), generator=generator)]
            elif seed == 1:
                matrix = matrix[:, torch.randperm(columns, generator=generator)]
            elif seed == 2 and len(matrix) % 2 == 0:
                matrix = matrix.view(2, -1, columns).transpose(0, 1).reshape(-1, columns)
            elif seed == 3 and len(matrix) > 1:
                matrix = matrix[1:]
            elif seed == 4:
                matrix = torch.cat(torch.chunk(matrix, 3)[::-1])
            elif seed == 5:
                matrix = matrix.T.contiguous().T
        return matrix

    selection = Tracer().trace(grids, make)
    values = Values(grids)
    assert selection is not None
    assert torch.equal(values.selected(selection), make(values))
