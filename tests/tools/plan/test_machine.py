"""The machine's rates: measured, kept for a day, and a drive's line."""

import json
import os
from pathlib import Path

import pytest
import torch
from tests.checkpoints import tiny_checkpoint

from tierrun.io.errors import UsageError
from tierrun.io.store import Store
from tierrun.tools.convert import convert
from tierrun.tools.plan import drive, machine
from tierrun.tools.plan.drive import Sample
from tierrun.tools.plan.knowing import GPU_OVERHEAD, IN_PLACE, Target, know
from tierrun.tools.plan.machine import Machine
from tierrun.tools.plan.making import make_plan
from tierrun.tools.plan.rates import Rates
from tierrun.tools.plan.request import Request
from tierrun.tools.plan.subject import find


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rates are kept; measuring takes next to no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in (
        ("_SECONDS", 0.0),
        ("_DISTINCT_BYTES", 1 << 20),
        ("_SIDE", 64),
        ("cache_bytes", lambda: 0),
    ):
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setattr(drive, "_SECONDS", 0.01)
    return tmp_path / "cache" / "tierrun" / "rates.json"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    convert(tiny_checkpoint("qwen3_moe", tmp_path / "c", dtype=torch.bfloat16), tmp_path / "store")
    return tmp_path / "store"


def test_everything_is_measured_and_said_whence(store: Path, cache: Path) -> None:
    plan = make_plan(Request(str(store), ram="64KiB", device="cpu")).plan
    sources = {rate.name: rate.source for rate in plan.rates}
    assert sources == {
        "drive": "measured on the store's records",
        "latency": "measured on the store's records",
        "overhead": "measured on a miniature model",
        "memory": "measured",
        "cpu": "measured",
        "cpu_resident": "measured",
        "cpu_flops": "measured",
    }
    assert all(rate.value > 0 for rate in plan.rates if rate.name != "latency")
    assert plan.decode.seconds["overhead"] > 0
    assert cache.exists()


def test_rates_are_kept_for_a_day(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Machine().host()

    def never() -> tuple[float, ...]:
        raise AssertionError

    monkeypatch.setattr(machine, "_measure_host", never)
    assert Machine().host() == known
    with pytest.raises(AssertionError):
        Machine(fresh=True).host()
    rows = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: [row[0] - 90_000, *row[1:]] for key, row in rows.items()}))
    with pytest.raises(AssertionError):
        Machine().host()


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "b"}', '{"a": [[]]}'])
def test_a_damaged_file_is_said_and_measured_over(
    text: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert Machine().host().memory > 0
    assert "cannot be used" in caplog.text
    assert Machine().host() == Machine().host()


@pytest.mark.parametrize(
    ("one", "several", "expected"),
    [
        (Sample(10, 3.0), Sample(80, 17.0), (5.0, 1.0)),  # a start of one second
        (Sample(10, 1.0), Sample(80, 15.0), (5.0, 0.0)),  # one comes faster than several
        (Sample(10, 2.0), Sample(80, 2.0), (40.0, 0.0)),  # no line through noise
        (Sample(10, 2.0), Sample(10, 2.0), (5.0, 0.0)),  # a store of one record
    ],
)
def test_a_drive_is_a_line(one: Sample, several: Sample, expected: tuple[float, float]) -> None:
    assert drive._line(lambda count: one if count == 1 else several) == pytest.approx(expected)


def test_the_drive_of_a_directory_is_measured_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "_FILE_BYTES", 16 << 20)
    directory = tmp_path / "drive"
    with pytest.raises(UsageError, match="no such directory"):
        drive.of_directories([directory], 4096)
    directory.mkdir()
    found = drive.of_directories([directory, directory], 5_000_000)
    assert found.bandwidth > 1e6
    assert list(directory.iterdir()) == []


def test_a_failing_drive_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "_FILE_BYTES", 16 << 20)
    before = len(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UsageError, match=r"Input/output error\); or give the drive's speed"):
        drive.of_directories([tmp_path], 4096)
    assert len(os.listdir("/proc/self/fd")) == before


def test_several_directories_of_a_store_count_together(store: Path, tmp_path: Path) -> None:
    both = [tmp_path / "a", tmp_path / "b"]
    convert(tmp_path / "c", both)
    found = drive._fullest_shards(Store.open(both))
    paths = Store.open(both).shard_paths
    assert [paths[shard].parent for shard, _ in found] == both
    assert drive.of_store(Store.open(both)).bandwidth > 0


def test_a_gpu_is_measured_and_nothing_of_the_cpu(
    store: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(machine, "_measure_device", lambda device: (50e9, 3e12, 800e12))
    asked = Request(str(store), assume="drive=3GB/s")
    subject = find(asked.source)
    target = Target(torch.device("cuda"), {"drive": 3e9})
    known = know(target, asked, subject, subject.manifest, subject.looked_up(), Machine())
    assert known.rates == Rates(
        3e9, 100e-6, GPU_OVERHEAD, pcie=50e9, in_place=IN_PLACE * 50e9, vram=3e12, gpu_flops=800e12
    )
    assert {name for name, source in known.sources.items() if source == "measured"} == {
        "pcie",
        "vram",
        "gpu_flops",
    }
    assert len(json.loads(cache.read_text())) == 1
