"""Sizes as people write them, and alignment."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.io.errors import UsageError
from tierrun.io.extent import PAGE, Extent, align_up, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("8GiB", 8 << 30),
        ("8gib", 8 << 30),
        ("8GB", 8 * 10**9),
        ("8G", 8 * 10**9),
        ("8Gi", 8 << 30),
        ("1.5 MiB", 3 << 19),
        (" 500MB ", 500 * 10**6),
        ("0.5k", 500),
        ("2TiB", 2 << 40),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 GiB free", "1e9", "8XiB", "0x10", "1,5GiB"])
def test_what_is_no_size_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@given(st.text())
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert parse_bytes(text) >= 0
    except UsageError:
        pass


@given(st.integers(0, 10**400), st.sampled_from(["", "k", "KiB", "TB", "TiB"]))
def test_whole_numbers_are_exact_however_large(n: int, unit: str) -> None:
    factor = {"": 1, "k": 1000, "KiB": 1024, "TB": 10**12, "TiB": 2**40}[unit]
    assert parse_bytes(f"{n}{unit}") == n * factor


@given(st.integers(0, 2**60), st.sampled_from([1, 7, 512, PAGE]))
def test_align_up_is_the_next_multiple(n: int, alignment: int) -> None:
    aligned = align_up(n, alignment)
    assert aligned % alignment == 0
    assert n <= aligned < n + alignment


@given(st.integers(0, 2**50))
def test_formatted_sizes_are_right_to_their_last_digit(n: int) -> None:
    text = format_bytes(n)
    digits = len(text.split()[0].partition(".")[2])
    unit = Decimal(parse_bytes(f"1{text.split()[1]}"))
    assert abs(Decimal(text.split()[0]) - n / unit) <= Decimal("0.5001") * Decimal(10) ** -digits


def test_an_extent_ends_after_its_bytes() -> None:
    assert Extent(PAGE, 10).end == PAGE + 10
