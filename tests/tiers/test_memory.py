"""What slabs are made of: page-aligned everywhere, pinned where that can be, said where not."""

import logging
from typing import Any

import pytest
import torch
from tests.tiers.vramrig import CPU, CUDA, on_cuda

from tierrun.io.errors import BudgetError, UsageError
from tierrun.io.extent import PAGE
from tierrun.tiers import memory
from tierrun.tiers.memory import DeviceMemory, OrdinaryMemory, PinnedMemory
from tierrun.tiers.slab import Slab

DEVICES = [CPU, pytest.param(CUDA, marks=on_cuda)]


class Refusing:
    """A CUDA runtime without pinned memory."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return 2


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = Refusing()
    monkeypatch.setattr(memory, "_cudart", lambda: runtime)


@pytest.mark.usefixtures("refused")
def test_pageable_memory_stands_in_for_pinned_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "tierrun"):
        slab = Slab(2, PAGE, PinnedMemory(CPU, strict=False))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pinning 8.0 KiB failed (cudaHostRegister: error 2)" in caplog.text
    slab.view(1, 0, PAGE).fill_(3)
    slab.release()
    assert slab.view(1, 0, PAGE).sum() == 3 * PAGE


@pytest.mark.usefixtures("refused")
def test_strict_wants_it_pinned() -> None:
    with pytest.raises(UsageError, match=r"pinning 4\.0 KiB failed .*--ram"):
        Slab(1, PAGE, PinnedMemory(CPU, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_cuda_nothing_is_pinned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tierrun"):
        PinnedMemory(CPU, strict=False).allocate(PAGE)
    assert "pageable memory is used" in caplog.text


def test_nothing_is_pinned_for_an_empty_slab() -> None:
    assert Slab(0, PAGE, PinnedMemory(CPU, strict=True)).nbytes == 0


@on_cuda
@pytest.mark.parametrize("nbytes", [PAGE, 3 * PAGE, (64 << 20) + PAGE])
def test_registered_memory_is_pinned_until_it_is_released(nbytes: int) -> None:
    pinned = PinnedMemory(CUDA, strict=True)
    slab = Slab(1, nbytes, pinned)
    view = slab.view(0, 0, nbytes)
    assert view.is_pinned() and not view.any()
    slab.release()
    assert not view.is_pinned()
    again = Slab(1, nbytes, pinned)
    assert again.view(0, 0, PAGE).is_pinned()
    again.release()


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 8])
def test_a_slab_of_chunks_is_aligned_and_offsets_are_positive(
    device: torch.device, chunks: int
) -> None:
    slab = Slab(5, 3 * PAGE, DeviceMemory(device), chunks)
    assert slab.nbytes == 5 * 3 * PAGE
    views = [slab.view(extent, PAGE, PAGE) for extent in range(5)]
    for value, view in enumerate(views):
        view.fill_(value)
        assert view.data_ptr() % PAGE == 0
        assert slab.offset(view) >= 0
        assert slab.base.data_ptr() + slab.offset(view) == view.data_ptr()
    assert [int(view.unique()) for view in views] == [0, 1, 2, 3, 4]


def test_a_chunk_is_dropped_with_its_extents_but_never_the_base() -> None:
    slab = Slab(5, PAGE, OrdinaryMemory(), 3)
    assert len(slab.droppable) == 2
    sizes = {chunk: len(slab.extents_of(chunk)) * PAGE for chunk in slab.droppable}
    for chunk in slab.droppable:
        assert slab.drop(chunk) == sizes[chunk]
    assert slab.nbytes == 5 * PAGE - sum(sizes.values()) == len(slab.base)
    assert slab.droppable == []
    assert sorted(slab.dropped) == sorted(sizes)
    for chunk, nbytes in sizes.items():
        slab.restore(chunk)
        assert slab.nbytes_of(chunk) == nbytes
    assert slab.nbytes == 5 * PAGE and slab.dropped == []
    assert all(slab.offset(slab.view(extent, 0, PAGE)) >= 0 for extent in range(5))


@on_cuda
def test_more_than_the_gpu_has_is_an_error_that_says_what_is_free() -> None:
    with pytest.raises(BudgetError, match=r"--vram: .* are refused: .* are free"):
        Slab(1, 1 << 42, DeviceMemory(CUDA))
