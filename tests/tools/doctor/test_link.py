"""PCIe links: degraded only where nothing else explains it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tools.doctor.trees import PORT, link, plant

from tierrun.tools.doctor.line import Area
from tierrun.tools.doctor.link import Link, link_line, sysfs_link

AREA = Area("GPU")

generations = st.integers(1, 6)
widths = st.sampled_from([1, 2, 4, 8, 16])
maybe_generations = st.none() | generations
links = st.builds(
    Link,
    maybe_generations,
    st.none() | widths,
    maybe_generations,
    st.none() | widths,
    maybe_generations,
    st.none() | st.just("why not"),
)


@given(shown=links)
def test_only_a_link_that_is_known_to_be_less_warns(shown: Link) -> None:
    line = link_line(AREA, "link", shown)
    if None in (shown.generation, shown.width):
        assert line.status == "unknown"
    elif line.status == "warn":
        assert shown.generation and shown.width and shown.most_generation and shown.most_width
        assert shown.excuse is None
        assert shown.generation < shown.most_generation or shown.width < shown.most_width
        assert shown.width < shown.most_width or shown.generation != shown.slot_generation
    else:
        assert line.status == "ok" and line.value.startswith(f"PCIe gen {shown.generation} x")


@given(
    generation=generations,
    width=widths,
    slot=maybe_generations,
    excuse=st.sampled_from([None, "why not"]),
)
def test_a_link_that_is_all_it_can_be_is_fine(
    generation: int, width: int, slot: int | None, excuse: str | None
) -> None:
    shown = Link(generation, width, generation, width, slot, excuse)
    line = link_line(AREA, "link", shown)
    assert line.status == "ok" and line.value.endswith(", all that the device can do")


@pytest.mark.parametrize(
    ("shown", "status", "value"),
    [
        (Link(1, 16, 4, 16, excuse="why"), "ok", "PCIe gen 1 x16, gen 4 x16 at most: why"),
        (Link(1, 4, 4, 16, excuse="why"), "ok", "PCIe gen 1 x4, gen 4 x16 at most: why"),
        (Link(1, 16, 4, 16), "warn", "PCIe gen 1 x16: degraded, the device can do gen 4 x16"),
        (Link(4, 8, 4, 16), "warn", "PCIe gen 4 x8: degraded, the device can do gen 4 x16"),
        (Link(4, 16, 5, 16, 4), "ok", "PCIe gen 4 x16, all that its slot allows"),
        (Link(4, 8, 5, 16, 4), "warn", "PCIe gen 4 x8: degraded"),
        (Link(3, 16, 5, 16, 4), "warn", "PCIe gen 3 x16: degraded"),
        (Link(5, 16, 1, 1), "ok", "PCIe gen 5 x16, all that the device can do"),
        (Link(4, 4, None, 4), "ok", "PCIe gen 4 x4; what the device could do is not shown"),
        (Link(None, None, 5, 16), "unknown", "its PCIe link is not shown here"),
    ],
)
def test_links(shown: Link, status: str, value: str) -> None:
    line = link_line(AREA, "link", shown)
    assert line.status == status and line.value.startswith(value)


def test_a_link_as_sysfs_shows_it(tmp_path: Path) -> None:
    device = f"{PORT}/0000:01:00.0"
    files = link(device, ("16.0 GT/s PCIe", "4"), ("32.0 GT/s PCIe", "8"))
    plant(tmp_path, files | {f"{PORT}/max_link_speed": "8.0 GT/s PCIe\n"})
    assert sysfs_link(tmp_path / device) == Link(4, 4, 5, 8, 3)


@pytest.mark.parametrize(
    ("speed", "width"),
    [("Unknown", "0"), ("Unknown", "255"), ("", ""), ("7 GT/s", "63"), ("x", "y")],
)
def test_what_sysfs_does_not_know_is_not_guessed(tmp_path: Path, speed: str, width: str) -> None:
    files = link(PORT, (speed, width), (speed, width))
    assert sysfs_link(plant(tmp_path, files) / PORT) == Link(None, None, None, None, None)
    assert sysfs_link(tmp_path / "gone") == Link(None, None, None, None, None)
