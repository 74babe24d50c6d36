"""The chunk of a prompt: as large as pays, and no larger than memory allows."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import Experts, tiny_store

from tierrun.io.extent import PAGE, Extent
from tierrun.io.store import Resident
from tierrun.tiers.chunking import (
    EFFICIENT,
    Rates,
    Room,
    choose_chunk,
    flops_per_token,
    sizes_for,
)

GIB = 1 << 30
LEAST, SHARE = 512, 1 / 8

rates = st.builds(
    Rates,
    upload=st.floats(1e8, 1e12),
    drive=st.floats(1e7, 1e11),
    tokens=st.floats(1, 1e7),
)
rooms = st.builds(
    Room,
    free=st.integers(0, 100 * GIB),
    asked=st.none() | st.integers(0, 100 * GIB),
    least=st.integers(0, GIB),
    experts=st.integers(1, 1000 * GIB),
    ram=st.integers(0, 1000 * GIB),
)
contexts = st.integers(1, 1 << 18)
slopes = st.floats(0, 1 << 20)


def taken(context: int, slope: float, fixed: int = 1 << 20) -> dict[int, int]:
    return {size: fixed + int(slope * size) for size in sizes_for(context)}


# -- what always holds ---------------------------------------------------------------------------


@given(contexts)
def test_sizes_are_powers_of_two_within_the_context_or_the_whole_of_it(context: int) -> None:
    sizes = sizes_for(context)
    assert list(sizes) == sorted(set(sizes)) and max(sizes) <= min(context, 8192)
    if context < LEAST:
        assert sizes == (context,)
    else:
        assert all(size >= LEAST and size & (size - 1) == 0 for size in sizes)


@given(contexts, slopes, rates, rooms)
def test_it_is_one_of_the_sizes_that_memory_allows(
    context: int, slope: float, speed: Rates, room: Room
) -> None:
    sizes = taken(context, slope)
    chunk, reason = choose_chunk(sizes, speed, room)
    assert chunk in sizes and reason
    if chunk != min(sizes):
        assert room.free - sizes[chunk] >= room.wanted
        assert chunk <= LEAST or sizes[chunk] <= SHARE * room.free


@given(contexts, slopes, rates, rooms)
def test_it_is_the_smallest_that_hides_what_moves_or_the_largest_that_may_be(
    context: int, slope: float, speed: Rates, room: Room
) -> None:
    sizes = taken(context, slope)
    chunk, _ = choose_chunk(sizes, speed, room)

    def hides(size: int) -> bool:
        return size / speed.tokens >= room.moving(sizes[size], speed)

    larger = [size for size in sizes if size > chunk and room.affords(size, sizes[size])]
    smaller = [size for size in sizes if EFFICIENT <= size < chunk]
    assert not any(hides(size) for size in smaller)
    assert not larger or (hides(chunk) and chunk >= EFFICIENT)


@given(contexts, slopes, rates, rooms, st.floats(1, 100), st.sampled_from(["upload", "drive"]))
def test_a_faster_way_wants_no_larger_chunk(
    context: int, slope: float, speed: Rates, room: Room, factor: float, name: str
) -> None:
    sizes, faster = taken(context, slope), replace(speed, **{name: getattr(speed, name) * factor})
    assert choose_chunk(sizes, faster, room).tokens <= choose_chunk(sizes, speed, room).tokens


@given(contexts, slopes, rates, rooms, st.floats(1, 100))
def test_a_faster_device_wants_no_smaller_chunk(
    context: int, slope: float, speed: Rates, room: Room, factor: float
) -> None:
    sizes, faster = taken(context, slope), replace(speed, tokens=speed.tokens * factor)
    assert choose_chunk(sizes, faster, room).tokens >= choose_chunk(sizes, speed, room).tokens


@given(contexts, slopes, slopes, rates, rooms.filter(lambda room: room.asked is not None))
def test_a_chunk_that_takes_more_is_no_larger(
    context: int, slope: float, more: float, speed: Rates, room: Room
) -> None:
    """With `--vram` given: with auto, what it takes has to be moved besides."""
    thrifty, greedy = taken(context, slope), taken(context, slope + more)
    room = replace(room, free=room.free + room.wanted + max(greedy.values()))
    assert choose_chunk(greedy, speed, room).tokens <= choose_chunk(thrifty, speed, room).tokens


@given(contexts, slopes, rates, rooms)
def test_what_moves_is_never_less_than_nothing_nor_more_than_all(
    context: int, slope: float, speed: Rates, room: Room
) -> None:
    for nbytes in taken(context, slope).values():
        assert 0 <= room.missing(nbytes) <= room.experts
        assert room.moving(nbytes, speed) >= room.missing(nbytes) / speed.upload


# -- machines that we know -----------------------------------------------------------------------

EXPERTS = 10240 * 1818624
"""40 layers of 256 experts of 3 × 2048 × 512 in Q4_K."""

WORKSPACE = {size: (64 << 20) + 360_000 * size for size in sizes_for(8192)}


def like_35b(
    peak: float, upload: float, free: int, vram: float | None, ram: int
) -> tuple[int, str]:
    """By TFLOP/s of a product, GB/s, GiB free, the share of the experts asked for, GiB of RAM."""
    speed = Rates(upload * 1e9, 3e9, peak * 1e12 / 8 / 3.6e9)
    asked = None if vram is None else int(vram * EXPERTS)
    return choose_chunk(WORKSPACE, speed, Room(free * GIB, asked, 17 << 20, EXPERTS, ram * GIB))


def test_an_h100_with_a_fifth_of_the_experts() -> None:
    chunk, reason = like_35b(800, 53, 76, 0.2, 100)
    assert chunk == 8192
    assert reason == ("computing takes 295 ms, moving 13.88 GiB of experts 281 ms (53.0 GB/s)")


def test_a_card_of_24_gib_on_pcie_4() -> None:
    chunk, reason = like_35b(160, 25, 21, 0.2, 50)
    assert chunk == 4096 and reason.startswith("computing takes 737 ms, moving 13.88 GiB")
    chunk, reason = like_35b(160, 25, 21, None, 50)
    assert (chunk, reason) == (2048, "all 17.34 GiB of experts are in VRAM")


def test_a_card_of_8_gib_has_no_memory_for_more() -> None:
    chunk, reason = like_35b(80, 12, 6, None, 50)
    assert chunk == 2048
    assert reason.startswith("computing takes 737 ms, moving 12.")
    assert reason.endswith("; 4096 would take 1.44 GiB of VRAM, too much")
    assert like_35b(80, 12, 2, None, 50)[0] == 512


def test_a_drive_is_slow_enough_for_the_largest() -> None:
    chunk, reason = like_35b(800, 53, 76, 0.2, 4)
    assert chunk == 8192
    assert reason.endswith(
        "(53.0 GB/s, 9.88 GiB of it from the drive at 3.0 GB/s); larger ones are not made"
    )


@pytest.mark.parametrize("context", [1, 3, 511, 600])
def test_tiny_contexts(context: int) -> None:
    room = Room(GIB, None, 0, 100 * GIB, GIB)
    chunk = choose_chunk(taken(context, 1.0), Rates(1e9, 1e9, 1e6), room)
    assert chunk.tokens == min(context, 512)


# -- what a token takes --------------------------------------------------------------------------


def test_a_token_takes_its_experts_and_the_resident_matrices() -> None:
    manifest = tiny_store([Experts(6, 2, pages=2), Experts(5, 3, pages=1)]).store.manifest
    of_a_page, extent = PAGE // 4, Extent(0, 0)

    def resident(name: str, *shape: int) -> Resident:
        return Resident(name, 0, "F32", shape, extent, 0)

    residents = (
        resident("embed_tokens.weight", 1000, 16),
        resident("q_proj.weight", 64, 16),
        resident("norm.weight", 16),
    )
    found = flops_per_token(replace(manifest, residents=residents), 1000)
    assert found == 2 * (2 * 2 * of_a_page + 3 * of_a_page + 64 * 16)
