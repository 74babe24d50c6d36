"""Which ways the engine takes from the drive: measured once, by numbers that are said."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.engine.conftest import Model
from tests.fakes import Experts, TinyStore, tiny_store
from tests.kvikios import FakeKvikio

import tierrun
from tierrun.engine import backend, storage, trials
from tierrun.engine.backend import chosen_reader
from tierrun.engine.devices import DeviceChoice
from tierrun.engine.options import Options
from tierrun.engine.storage import drive_bandwidth, measured_paths, open_straight
from tierrun.engine.trials import measure_store
from tierrun.io.drives import Drive
from tierrun.io.errors import UsageError
from tierrun.io.measuring import Plan
from tierrun.io.profiles import DIRECT, GDS, GDS_DEVICE, STAGED, WAYS, Cell
from tierrun.io.reader import choose_reader
from tierrun.io.store import ExpertKey, Store


def _writable(buf: torch.Tensor | memoryview) -> memoryview:
    """A tensor in host memory stands in for one on a GPU."""
    return buf if isinstance(buf, memoryview) else buf.numpy().data


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tierrun" / "drives"


@pytest.fixture
def tiny(tmp_path: Path) -> TinyStore:
    return tiny_store([Experts(6, 2, pages=2), Experts(6, 2, pages=1)], [tmp_path / "store"])


@pytest.fixture
def store(tiny: TinyStore) -> Store:
    written = tiny.write()
    if choose_reader("direct", written.shard_paths).fallback:
        pytest.skip("no O_DIRECT on this machine's disk")
    return written


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    return FakeKvikio().install(monkeypatch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, kvikio: FakeKvikio) -> "FakeGpu":
    return FakeGpu(monkeypatch)


class FakeGpu:
    """A GPU for the choice: measuring gives `rates` in GB/s, and is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.drive = "H100", "nvme.1"
        self.monkeypatch = monkeypatch
        self.rates = {DIRECT: 5.0, GDS: 4.0, STAGED: 4.0, GDS_DEVICE: 6.0}
        self.measured: list[Sequence[int]] = []
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: self.name)
        monkeypatch.setattr(storage, "measure_store", self._measure)
        monkeypatch.setattr(storage, "drives_of", lambda paths: (Drive("9:1", self.drive),))
        monkeypatch.setattr(backend, "choose_device", lambda asked: DeviceChoice(CUDA, "fake"))

    def _measure(self, store: Store, device: torch.device, plan: Plan) -> list[Cell]:
        self.measured.append(plan.sizes)
        return [
            Cell(way, nbytes, depth, rate * 1e9)
            for way, rate in self.rates.items()
            for nbytes in plan.sizes
            for depth in plan.depths
        ]


def test_the_first_run_measures_and_the_second_remembers(
    gpu: FakeGpu, store: Store, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        first = measured_paths(store, Options(), CUDA)
    assert (first.to_host, first.to_device) == ("direct", "gds")
    assert "measuring how to read" in caplog.text and "no profile" in caplog.text
    assert "gds → VRAM: 0.01 MiB, 16 at once: 6.00 GB/s" in caplog.text
    assert (cache / "drive-9-1.json").is_file()
    assert measured_paths(store, Options(), CUDA) == first
    assert len(gpu.measured) == 1


def test_a_drive_is_as_fast_as_its_profile_says_and_no_other_is(gpu: FakeGpu, store: Store) -> None:
    assert drive_bandwidth(store) is None, "nobody has measured it"
    measured_paths(store, Options(), CUDA)
    assert drive_bandwidth(store) == 5e9
    gpu.drive = "nvme.2"
    assert drive_bandwidth(store) is None, "another one is in its place"


def _other_drive(gpu: FakeGpu, kvikio: FakeKvikio) -> None:
    gpu.drive = "nvme.2"


def _other_gpu(gpu: FakeGpu, kvikio: FakeKvikio) -> None:
    gpu.name = "H200"


def _no_driver(gpu: FakeGpu, kvikio: FakeKvikio) -> None:
    kvikio.driver = False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_drive, "something else: drives 'nvme.1' then, 'nvme.2' now"),
        (_other_gpu, "something else: gpu 'H100' then, 'H200' now"),
        (_no_driver, "something else: mode 'cuFile with nvidia-fs' then"),
    ],
)
def test_a_profile_of_something_else_is_measured_again(
    change: Callable[[FakeGpu, FakeKvikio], None],
    said: str,
    gpu: FakeGpu,
    kvikio: FakeKvikio,
    store: Store,
    caplog: pytest.LogCaptureFixture,
) -> None:
    measured_paths(store, Options(), CUDA)
    change(gpu, kvikio)
    gpu.rates[GDS] = 50.0
    with caplog.at_level(logging.INFO):
        assert measured_paths(store, Options(), CUDA).to_host == "gds"
        assert measured_paths(store, Options(), CUDA).to_host == "gds"
    assert said in caplog.text
    assert len(gpu.measured) == 2


def test_a_kvikio_of_another_version_is_measured_again(
    gpu: FakeGpu, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_paths(store, Options(), CUDA)
    FakeKvikio(version="27.02.0").install(monkeypatch)
    measured_paths(store, Options(), CUDA)
    assert len(gpu.measured) == 2


def test_records_of_other_sizes_join_the_profile(
    gpu: FakeGpu, store: Store, tmp_path: Path
) -> None:
    other = tiny_store([Experts(4, 2, pages=70)], [tmp_path / "other"]).write()
    for opened in (store, other, store, other):
        measured_paths(opened, Options(), CUDA)
    assert gpu.measured == [(4096, 8192), (70 * 4096,)]


def test_what_could_not_all_be_measured_is_not_kept(gpu: FakeGpu, store: Store) -> None:
    del gpu.rates[GDS_DEVICE]
    for _ in range(2):
        measured = measured_paths(store, Options(), CUDA)
        assert measured.to_device == "staged" and "was not measured" in measured.reason
    assert len(gpu.measured) == 2


def test_the_choice_is_logged_with_its_numbers(
    gpu: FakeGpu, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.rates[GDS] = 7.5
    with caplog.at_level(logging.INFO):
        assert chosen_reader(store, Options()) == "gds"
    assert "reads: gds (to RAM gds (gds 7.50, direct 5.00 GB/s); to VRAM gds" in caplog.text


@pytest.mark.parametrize("io", ["direct", "mmap", "buffered"])
def test_what_was_asked_for_is_not_measured(io: str, gpu: FakeGpu, store: Store) -> None:
    assert measured_paths(store, Options(io=io), CUDA)[:2] == (io, "staged")
    assert chosen_reader(store, Options(io=io)) == io
    assert measured_paths(store, Options(io="gds"), CUDA)[:2] == ("gds", "gds")
    assert not gpu.measured


def test_where_there_is_no_gds_the_reason_is_said(
    gpu: FakeGpu, kvikio: FakeKvikio, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    kvikio.fails = lambda offset, size: True
    with caplog.at_level(logging.INFO):
        assert chosen_reader(store, Options()) == "direct"
    assert "reads: direct (gds: off, kvikio: cuFile error" in caplog.text
    assert measured_paths(store, Options(io="gds"), CUDA)[:2] == ("gds", "staged")
    assert measured_paths(store, Options(), CPU).to_device == "staged"
    assert not gpu.measured


def test_on_the_cpu_nothing_is_measured(store: Store, kvikio: FakeKvikio) -> None:
    assert chosen_reader(store, Options(device="cpu")) == "direct"
    assert not kvikio.reads


# -- the real thing, as far as there is no GPU ------------------------------------------------


@pytest.mark.parametrize("with_gds", [True, False])
def test_a_store_is_measured(with_gds: bool, store: Store, kvikio: FakeKvikio) -> None:
    plan = Plan((4096, 8192), (1, 2), 0.01)
    cells = measure_store(store, CPU, plan, with_gds=with_gds)
    ways = [DIRECT, GDS] if with_gds else [DIRECT]
    assert {cell.way for cell in cells} == set(ways)
    assert len(cells) == 4 * len(ways)
    assert all(cell.bandwidth > 0 for cell in cells)
    assert bool(kvikio.reads) == with_gds


def test_what_cannot_be_measured_is_not_used(gpu: FakeGpu, store: Store) -> None:
    def fail(*arguments: object) -> list[Cell]:
        raise OSError(24, "Too many open files")

    gpu.monkeypatch.setattr(storage, "measure_store", fail)
    measured = measured_paths(store, Options(), CUDA)
    assert (measured.to_host, measured.to_device) == ("direct", "staged")
    assert "Too many open files" in measured.reason


def test_ways_into_vram_are_measured(
    store: Store, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With host memory for VRAM; kvikio takes a CPU tensor for nothing it knows."""
    memory = torch.empty(8192, dtype=torch.uint8)
    monkeypatch.setattr(trials, "_device_memory", lambda nbytes, device: memory)
    monkeypatch.setattr("tests.kvikios._writable", _writable)
    cells = measure_store(store, CPU, Plan((8192,), (1, 3), 0.01))
    assert {cell.way for cell in cells} == set(WAYS)


@pytest.mark.parametrize("to_device", ["staged", "gds"])
def test_straight_reads_are_opened_and_closed(
    to_device: str,
    tiny: TinyStore,
    store: Store,
    kvikio: FakeKvikio,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where kvikio fails, its spare reads."""
    monkeypatch.setattr("tests.kvikios._writable", _writable)
    reads = open_straight(store, Options(depth=2), CPU, to_device)
    key = ExpertKey(0, 3)
    into = torch.zeros(8192, dtype=torch.uint8)
    kvikio.fails = lambda offset, size: True
    reads.submit(key, into).result(20)
    assert into.numpy().tobytes() == tiny.record(key)
    assert ("then" in reads.reader_name) == (to_device == "gds")
    reads.close()


def test_a_model_runs_on_kvikio_and_survives_it(
    model: Model, kvikio: FakeKvikio, caplog: pytest.LogCaptureFixture
) -> None:
    """Reads into the tiers, an error after some of them, and the same logits."""
    tokens = [1, 2, 3, 4, 5, 6]
    with tierrun.load(model.store, ram=str(model.smallest), device="cpu") as engine:
        expected = engine.logits(tokens)
    with tierrun.load(
        model.store, ram=str(model.smallest), device="cpu", io="gds", strict=True
    ) as engine:
        begun = len(kvikio.reads)
        kvikio.fails = lambda offset, size: len(kvikio.reads) > begun + 3
        assert torch.equal(engine.logits(tokens), expected)
        assert engine.stats().reader == "gds, then direct"
    assert begun < len(kvikio.reads)
    assert sum("in mid-run" in record.getMessage() for record in caplog.records) == 1


def test_strict_wants_gds_where_it_is_asked_for(model: Model, kvikio: FakeKvikio) -> None:
    kvikio.driver = False
    with pytest.raises(UsageError, match="--io gds: .*--strict"):
        tierrun.load(model.store, ram="1GiB", device="cpu", io="gds", strict=True)
