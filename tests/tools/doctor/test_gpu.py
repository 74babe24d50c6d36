"""The GPU's lines, from what a child found out on machines that are not this one."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tools.doctor.trees import (
    EPYC,
    H100_ADDRESS,
    NVIDIA_VERSION,
    cpuinfo,
    link,
    nvidia_pci,
    plant,
)

from tierrun.tools.doctor.child import Answer
from tierrun.tools.doctor.facts import Cuda, Gds, Gpu, Pinned, SmiLink
from tierrun.tools.doctor.gpu import gpu_lines, nvidia_gpus
from tierrun.tools.doctor.line import Line
from tierrun.tools.doctor.smi import parse_links, plain_address

GIB = 1 << 30
DRIVER = {"proc/driver/nvidia/version": NVIDIA_VERSION}
H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    free=78 * GIB,
    total=79 * GIB,
    address=H100_ADDRESS,
    obstacle=None,
)
LINK = SmiLink(
    address=H100_ADDRESS, generation=5, width=16, most_generation=5, most_width=16, loaded=True
)
GOOD = Cuda(
    torch="2.11.0+cu130",
    built_for="13.0",
    supports=13000,
    gpus=(H100,),
    pinned=Pinned(nbytes=4 * GIB, obstacle=None),
    links=(LINK,),
    gds=Gds(usable=False, native=False, reason="kvikio is not installed; pip install it"),
)
CPU_ONLY = Cuda(torch="2.13.0+cpu", obstacle="this torch is built without CUDA", gpus=())


def examined(root: Path, facts: Cuda | None, problem: str = "") -> dict[str, Line]:
    return {line.name: line for line in gpu_lines(root, Answer(facts, problem))}


def changed(model: Any, **values: Any) -> Any:
    return model.model_copy(update=values)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """One with an H100 and its driver."""
    return plant(tmp_path, nvidia_pci() | DRIVER)


def test_a_good_machine_has_nothing_wrong(machine: Path) -> None:
    lines = examined(machine, GOOD)
    assert {line.status for line in lines.values()} == {"ok"}
    assert {name: line.value for name, line in lines.items()} == {
        "torch": "2.11.0+cu130, built for CUDA 13.0",
        "driver": "580.159.04, for CUDA up to 13.0",
        "GPU 0": "NVIDIA H100 80GB HBM3, compute capability 9.0, 78.00 GiB of 79.00 GiB free",
        "link 0": "PCIe gen 5 x16, all that the device can do",
        "pinned memory": "4.00 GiB pinned at once, more was not tried",
        "GDS": "off: kvikio is not installed; pip install it; reads go through pinned RAM",
    }


def test_a_machine_without_gpu_has_nothing_wrong(tmp_path: Path) -> None:
    lines = examined(tmp_path, CPU_ONLY)
    assert {line.status for line in lines.values()} == {"ok"}
    assert lines["driver"].value == "none, and no NVIDIA GPU on the PCI bus"
    assert lines["GDS"].value == "off: no GPU to read into"
    with_cuda = changed(CPU_ONLY, built_for="13.0", obstacle="Found no NVIDIA driver")
    assert {line.status for line in examined(tmp_path, with_cuda).values()} == {"ok"}


def test_nvidia_libraries_without_a_gpu_are_no_fault(tmp_path: Path) -> None:
    facts = changed(GOOD, gpus=(), obstacle="No CUDA GPUs are available")
    lines = examined(tmp_path, facts)
    assert {line.status for line in lines.values()} == {"ok"}
    plant(tmp_path, {"dev/dxg": ""})
    assert examined(tmp_path, facts)["GPUs"].status == "fail", "WSL, which has one"


def test_only_display_controllers_of_nvidia_are_gpus(machine: Path) -> None:
    assert nvidia_gpus(machine) == [H100_ADDRESS]


def test_a_gpu_that_torch_cannot_know_warns(machine: Path) -> None:
    lines = examined(machine, changed(CPU_ONLY, supports=13000))
    assert [name for name, line in lines.items() if line.status != "ok"] == ["torch"]
    assert lines["torch"].status == "warn"


def test_a_gpu_without_driver_warns(tmp_path: Path) -> None:
    plant(tmp_path, nvidia_pci())
    facts = Cuda(torch="2.11.0", built_for="13.0", gpus=(), obstacle="Found no NVIDIA driver")
    lines = examined(tmp_path, facts)
    assert lines["driver"].status == "warn" and H100_ADDRESS in lines["driver"].value
    assert "GPUs" not in lines, "the driver's line has said it"


def test_a_driver_without_its_library_warns(machine: Path) -> None:
    facts = Cuda(torch="2.11.0", built_for="13.0", gpus=(), obstacle="Found no NVIDIA driver")
    line = examined(machine, facts)["driver"]
    assert line.status == "warn" and line.value.startswith("580.159.04, but libcuda.so.1")


def test_a_driver_that_is_too_old_fails_and_says_what_fits(machine: Path) -> None:
    obstacle = "The NVIDIA driver on your system is too old (found version 12040)"
    facts = Cuda(torch="2.11.0", built_for="13.0", supports=12040, gpus=(), obstacle=obstacle)
    line = examined(machine, facts)["GPUs"]
    assert (line.status, line.value) == ("fail", obstacle)
    assert line.advice is not None and "built for CUDA 12.4" in line.advice


@pytest.mark.parametrize(
    ("visible", "status"), [("", "ok"), ("-1", "ok"), ("7", "fail"), (None, "fail")]
)
def test_gpus_that_are_hidden_on_purpose_are_no_fault(
    machine: Path, visible: str | None, status: str
) -> None:
    facts = changed(GOOD, gpus=(), obstacle="No CUDA GPUs are available", visible=visible)
    line = examined(machine, facts)["GPUs"]
    assert line.status == status
    assert visible is None or f"CUDA_VISIBLE_DEVICES={visible}" in f"{line.value} {line.advice}"


def test_a_gpu_that_is_too_old_fails(machine: Path) -> None:
    old = changed(H100, obstacle="its compute capability is 7.5, 8.0 is needed")
    lines = examined(machine, changed(GOOD, gpus=(old,), pinned=None, gds=None))
    assert lines["GPU 0"].status == "fail" and "7.5" in lines["GPU 0"].value
    assert not {"pinned memory", "GDS"} & set(lines), "nothing is moved to it"


def test_a_gpu_that_others_use_warns(machine: Path) -> None:
    taken = changed(H100, free=30 * GIB)
    assert examined(machine, changed(GOOD, gpus=(taken,)))["GPU 0"].status == "warn"
    unknown = changed(H100, free=None, total=None)
    assert examined(machine, changed(GOOD, gpus=(unknown,)))["GPU 0"].status == "unknown"


def test_pinning_that_ends_early_warns(machine: Path) -> None:
    pinned = Pinned(nbytes=GIB, obstacle="pinning 256.0 MiB failed (cudaHostRegister: error 2)")
    line = examined(machine, changed(GOOD, pinned=pinned))["pinned memory"]
    assert line.status == "warn" and line.value.startswith("1.00 GiB, then pinning 256.0 MiB")


@pytest.mark.parametrize(
    ("gds", "value"),
    [
        (Gds(usable=True, native=True, reason="cuFile"), "native (cuFile)"),
        (
            Gds(usable=True, native=False, reason="nvidia-fs is not loaded"),
            "not native: nvidia-fs is not loaded; reads go through pinned RAM",
        ),
    ],
)
def test_gds(machine: Path, gds: Gds, value: str) -> None:
    line = examined(machine, changed(GOOD, gds=gds))["GDS"]
    assert (line.status, line.value) == ("ok", value)


# -- links ----------------------------------------------------------------------------------------


def test_a_gpu_at_rest_is_not_called_degraded(machine: Path) -> None:
    resting = changed(LINK, generation=1, loaded=False)
    line = examined(machine, changed(GOOD, links=(resting,)))["link 0"]
    assert line.status == "ok" and "gen 1 x16, gen 5 x16 at most: a GPU at rest" in line.value


def test_a_link_that_copies_did_not_wake_is_degraded(machine: Path) -> None:
    slow = changed(LINK, generation=3)
    assert examined(machine, changed(GOOD, links=(slow,)))["link 0"].status == "warn"


def test_what_the_card_could_do_comes_from_sysfs(machine: Path) -> None:
    """nvidia-smi's maximum is that of card and slot together: x8 of x8 in a narrow slot."""
    narrow = changed(LINK, width=8, most_width=8)
    device = f"sys/bus/pci/devices/{H100_ADDRESS}"
    plant(machine, link(device, ("32.0 GT/s PCIe", "8"), ("32.0 GT/s PCIe", "16")))
    line = examined(machine, changed(GOOD, links=(narrow,)))["link 0"]
    assert line.status == "warn" and line.value.startswith("PCIe gen 5 x8: degraded")


def test_a_newer_card_in_an_older_slot_is_fine(machine: Path) -> None:
    older = changed(LINK, generation=4, most_generation=4)
    device = f"sys/bus/pci/devices/{H100_ADDRESS}"
    plant(machine, link(device, ("16.0 GT/s PCIe", "16"), ("32.0 GT/s PCIe", "16")))
    line = examined(machine, changed(GOOD, links=(older,)))["link 0"]
    assert line.status == "ok" and "all that its slot allows" in line.value


def test_sysfs_stands_in_for_nvidia_smi(machine: Path) -> None:
    device = f"sys/bus/pci/devices/{H100_ADDRESS}"
    plant(machine, link(device, ("2.5 GT/s PCIe", "16"), ("32.0 GT/s PCIe", "16")))
    line = examined(machine, changed(GOOD, links=()))["link 0"]
    assert line.status == "ok" and "gen 1 x16, gen 5 x16 at most: a GPU at rest" in line.value


def test_what_a_virtual_machine_shows_is_not_believed(machine: Path) -> None:
    """Its configuration space is made up by the hypervisor; the driver's word counts."""
    device = f"sys/bus/pci/devices/{H100_ADDRESS}"
    files = cpuinfo(f"{EPYC} hypervisor")
    files |= link(device, ("2.5 GT/s PCIe", "1"), ("64.0 GT/s PCIe", "32"))
    plant(machine, files)
    told = examined(machine, GOOD)["link 0"]
    assert (told.status, told.value) == ("ok", "PCIe gen 5 x16, all that the device can do")
    shown = examined(machine, changed(GOOD, links=()))["link 0"]
    assert shown.status == "ok" and "a virtual machine may show" in shown.value
    slow = changed(LINK, generation=3)
    assert examined(machine, changed(GOOD, links=(slow,)))["link 0"].status == "warn"


@pytest.mark.parametrize("address", [None, "0000:09:00.0"])
def test_a_link_that_nobody_shows_is_unknown(machine: Path, address: str | None) -> None:
    gpu = changed(H100, address=address)
    assert examined(machine, changed(GOOD, gpus=(gpu,)))["link 0"].status == "unknown"


# -- a child that did not come to its end ---------------------------------------------------------


def test_no_answer_at_all(machine: Path) -> None:
    lines = examined(machine, None, "no answer within 14 s")
    assert lines["driver"].value == "580.159.04"
    assert (lines["CUDA"].status, lines["CUDA"].value) == ("unknown", "no answer within 14 s")


def test_a_child_that_ended_before_torch(machine: Path) -> None:
    lines = examined(machine, Cuda(supports=13000), "no answer within 14 s")
    statuses = {name: line.status for name, line in lines.items()}
    assert statuses == {"torch": "unknown", "driver": "ok", "CUDA": "unknown"}


def test_a_child_that_ended_before_its_gpus(machine: Path) -> None:
    lines = examined(machine, changed(GOOD, gpus=None), "no answer within 14 s")
    assert lines["CUDA"].status == "unknown" and lines["torch"].status == "ok"


def test_a_child_that_ended_while_pinning(machine: Path) -> None:
    lines = examined(machine, changed(GOOD, pinned=None, gds=None, links=None), "code -11")
    assert [lines[name].status for name in ("pinned memory", "GDS")] == ["unknown"] * 2
    assert lines["GPU 0"].status == "ok"


def test_a_torch_that_cannot_be_loaded_fails(machine: Path) -> None:
    lines = examined(machine, Cuda(torch_error="libcudart.so.13: cannot open", supports=13000))
    assert lines["torch"].status == "fail" and "libcudart" in lines["torch"].value
    assert "CUDA" not in lines


# -- nvidia-smi -----------------------------------------------------------------------------------


def test_nvidia_smi() -> None:
    rows = f"0000{H100_ADDRESS}, 5, 16, 5, 16\n00000001:0A:00.0, [N/A], [N/A], 4, 16\n"
    first, second = parse_links(rows, True)
    assert first == LINK
    assert (second.address, second.generation, second.most_generation) == ("0001:0a:00.0", None, 4)


@given(output=st.text() | st.lists(st.text(alphabet="0123456789, .:\n[]NA/")).map("\n".join))
def test_any_output_of_nvidia_smi_gives_links_in_range(output: str) -> None:
    for found in parse_links(output, False):
        numbers = (found.generation, found.width, found.most_generation, found.most_width)
        assert all(n is None or n > 0 for n in numbers)
        assert plain_address(found.address) == found.address
