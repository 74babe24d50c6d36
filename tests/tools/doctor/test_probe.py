"""The child that looks at CUDA, on a torch that pretends to have it."""

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kvikios import FakeKvikio

from tierrun.io.errors import UsageError
from tierrun.tiers import memory
from tierrun.tools.doctor import probe
from tierrun.tools.doctor.facts import Cuda, Gpu

GIB = 1 << 30


class FakeLibcuda:
    """libcuda.so.1, as far as the probe calls it."""

    def __init__(self, version: int = 13000) -> None:
        self._version = version

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._version
        return 0 if self._version else 34

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0 if index < 2 else 101

    def cuDeviceGetPCIBusId(self, name: Any, length: int, device: ctypes.c_int) -> int:
        name.value = f"0000:4{device.value}:00.0".encode()
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two GPUs and a driver; change what they say."""
    said: dict[str, Any] = {"count": 2, "capability": (9, 0), "error": None, "memory": (3, 4)}

    def init() -> None:
        if said["error"]:
            raise RuntimeError(said["error"])

    def mem_get_info(index: int) -> tuple[int, int]:
        if said["memory"] is None:
            raise RuntimeError("CUDA-capable device(s) is/are busy\nmore")
        found: tuple[int, int] = said["memory"]
        return found

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: said["error"] is None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: said["count"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: said["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(probe, "_libcuda", FakeLibcuda)
    return said


def gpus() -> Cuda:
    return probe.gpu_facts(probe.torch_facts(Cuda()))


def test_every_gpu_is_described(machine: dict[str, Any]) -> None:
    facts = gpus()
    assert (facts.torch, facts.built_for) == (torch.__version__, "13.0")
    assert facts.gpus is not None and facts.obstacle is None
    assert facts.gpus[1] == Gpu(
        name="card 1", capability=(9, 0), free=3, total=4, address="0000:41:00.0", obstacle=None
    )
    assert probe.usable(facts) == [0, 1]


def test_a_driver_that_is_too_old(machine: dict[str, Any]) -> None:
    machine["error"] = "The NVIDIA driver on your system is too old.\nmore"
    facts = gpus()
    assert facts.gpus == () and facts.obstacle is not None and "too old" in facts.obstacle


@pytest.mark.parametrize(
    ("change", "said"),
    [({"capability": (7, 5)}, "capability is 7.5"), ({"memory": None}, "is/are busy")],
)
def test_a_gpu_that_cannot_be_used(
    change: dict[str, Any], said: str, machine: dict[str, Any]
) -> None:
    machine.update(change)
    facts = gpus()
    assert facts.gpus is not None and said in str(facts.gpus[0].obstacle)
    assert probe.usable(facts) == []
    assert probe.pinned_facts(facts) == probe.gds_facts(facts) == facts, "nothing is tried on it"


@pytest.mark.parametrize(("version", "found"), [(12080, 12080), (0, None)])
def test_what_the_driver_supports(
    version: int, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_libcuda", lambda: FakeLibcuda(version))
    assert probe.driver_supports() == found


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(probe, "_libcuda", missing)
    assert probe.driver_supports() is None


class FakePinned:
    """Pins `room` bytes in all; holds none of them."""

    room = 0

    def __init__(self, device: torch.device, *, strict: bool) -> None:
        assert strict, "what is refused must be an error"
        self.held = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        if self.held + nbytes > self.room:
            raise UsageError("pinning failed (cudaHostRegister: error 2)")
        self.held += nbytes
        return torch.zeros(16, dtype=torch.uint8)

    def release(self, part: torch.Tensor) -> None:
        pass


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any]) -> Iterator[type[FakePinned]]:
    monkeypatch.setattr(memory, "PinnedMemory", FakePinned)
    yield FakePinned
    FakePinned.room = 0


@pytest.mark.parametrize(
    ("room", "free", "found"),
    [
        (100 * GIB, 100 * GIB, 4 * GIB),
        (100 * GIB, 8 * GIB, 2 * GIB),
        (GIB + 5, 100 * GIB, GIB),
        (0, 100 * GIB, 0),
        (100 * GIB, 0, 0),
    ],
)
def test_pinning_is_tried_within_a_cap(
    room: int,
    free: int,
    found: int,
    pinned: type[FakePinned],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned.room = room
    monkeypatch.setattr(probe, "host_memory", lambda: memory_of(free))
    facts = probe.pinned_facts(gpus()).pinned
    assert facts is not None and facts.nbytes == found
    refused = room < min(4 * GIB, free // 4)
    assert (facts.obstacle is not None) == refused


def memory_of(free: int) -> Any:
    return type("Memory", (), {"free": free})


def test_without_copies_the_links_are_at_rest(
    pinned: type[FakePinned], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This torch cannot copy to a GPU at all."""
    seen: list[bool] = []
    monkeypatch.setattr(probe, "query_links", lambda loaded: seen.append(loaded) or [])
    assert probe.pinned_facts(gpus()).links == ()
    assert seen == [torch.cuda.is_available()]


def test_gds_with_kvikio(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    FakeKvikio(driver=False).install(monkeypatch)
    found = probe.gds_facts(gpus()).gds
    assert found is not None and found.usable and not found.native
    assert "nvidia-fs" in found.reason
    FakeKvikio(driver=True).install(monkeypatch)
    found = probe.gds_facts(gpus()).gds
    assert found is not None and found.native


def test_gds_without_kvikio(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kvikio", None)
    found = probe.gds_facts(gpus()).gds
    assert found is not None and not found.usable and "kvikio" in found.reason


def test_every_step_is_printed(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine["capability"] = (7, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    probe.main()
    steps = [Cuda.model_validate_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [step.gpus is not None for step in steps] == [False, False, True, True, True]
    assert [step.torch is not None for step in steps] == [False, True, True, True, True]
    assert (steps[-1].visible, steps[-1].supports) == ("0,1", 13000)


def test_the_file_that_gds_is_tried_on_has_a_page() -> None:
    assert Path(probe.threading.__file__).stat().st_size >= 4096
