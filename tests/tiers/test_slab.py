"""A slab is page-aligned memory, handed out in views."""

import pytest
import torch

from tierrun.io.extent import PAGE
from tierrun.tiers.slab import Slab, host_bytes


@pytest.mark.parametrize("extent_bytes", [PAGE, 3 * PAGE, 2 << 20])
def test_every_extent_begins_on_a_page(extent_bytes: int) -> None:
    slab = Slab(3, extent_bytes)
    assert slab.nbytes == 3 * extent_bytes
    for extent in range(3):
        assert slab.view(extent, 0, PAGE).data_ptr() % PAGE == 0


def test_views_are_of_the_same_memory_and_do_not_overlap() -> None:
    slab = Slab(2, 2 * PAGE)
    views = [slab.view(extent, offset, PAGE) for extent in range(2) for offset in (0, PAGE)]
    for value, view in enumerate(views):
        view.fill_(value)
    assert [int(view.unique()) for view in views] == [0, 1, 2, 3]
    assert slab.view(1, 0, 2 * PAGE)[PAGE] == 3


def test_readers_write_through_to_the_view() -> None:
    view = Slab(1, PAGE).view(0, 0, PAGE)
    host_bytes(view)[:4] = b"abcd"
    assert view[:4].tolist() == list(b"abcd")


def test_views_keep_the_memory_alive() -> None:
    view = Slab(1, PAGE).view(0, 0, PAGE)
    assert torch.equal(view, torch.zeros(PAGE, dtype=torch.uint8))


def test_an_empty_slab_is_allowed() -> None:
    assert Slab(0, PAGE).nbytes == 0


@pytest.mark.parametrize(("extent", "offset", "nbytes"), [(2, 0, 1), (-1, 0, 1), (0, PAGE, 1)])
def test_a_view_outside_its_extent_is_refused(extent: int, offset: int, nbytes: int) -> None:
    with pytest.raises(AssertionError):
        Slab(2, PAGE).view(extent, offset, nbytes)
