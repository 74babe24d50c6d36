"""CUDA, the GPUs and how they are reached, from what the doctor's child found out."""

import re
from pathlib import Path

from tierrun.io.extent import format_bytes
from tierrun.tools.doctor.child import Answer
from tierrun.tools.doctor.facts import Cuda, Gpu, SmiLink
from tierrun.tools.doctor.files import text
from tierrun.tools.doctor.line import Area, Line
from tierrun.tools.doctor.link import AT_REST, VIRTUAL, Link, link_line, sysfs_link
from tierrun.tools.doctor.processor import in_virtual_machine

GPU = Area("GPU")

_NVIDIA = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")
"""VGA and 3D controllers."""

_MODULE = re.compile(r"Kernel Module(?: for \S+)?\s+(\d+\.[\d.]+)")


def nvidia_gpus(root: Path) -> list[str]:
    """The PCI addresses of NVIDIA's GPUs, whether or not a driver serves them."""
    devices = sorted((root / "sys/bus/pci/devices").glob("*"))
    return [
        device.name
        for device in devices
        if text(device / "vendor") == _NVIDIA
        and (text(device / "class") or "").startswith(_DISPLAY_CLASSES)
    ]


def has_gpu(root: Path) -> bool:
    """Whether there should be a GPU that CUDA offers: on the bus, by its driver, or through WSL."""
    return bool(nvidia_gpus(root) or driver_version(root) or (root / "dev/dxg").exists())


def gpu_lines(root: Path, answer: Answer[Cuda]) -> list[Line]:
    """Everything about GPUs; what the child did not come to is unknown."""
    facts, problem = answer
    if facts is None:
        return [_driver(root, None), GPU.unknown("CUDA", problem)]
    lines = [torch_line(root, facts, problem), _driver(root, facts)]
    if facts.gpus is None:
        return lines + ([GPU.unknown("CUDA", problem)] if facts.torch_error is None else [])
    if not facts.gpus:
        return [*lines, *_without_gpu(root, facts)]
    for index, gpu in enumerate(facts.gpus):
        lines += [_gpu(index, gpu), link_line(GPU, f"link {index}", gpu_link(root, gpu, facts))]
    return [*lines, *_moving(facts, problem)]


def torch_line(root: Path, facts: Cuda, problem: str) -> Line:
    """torch's build, and whether it knows CUDA."""
    if facts.torch_error is not None:
        advice = "pip install --force-reinstall torch"
        return GPU.fail("torch", f"cannot be loaded: {facts.torch_error}", advice)
    if facts.torch is None:
        return GPU.unknown("torch", problem)
    if facts.built_for is not None:
        return GPU.ok("torch", f"{facts.torch}, built for CUDA {facts.built_for}")
    value = f"{facts.torch}, built without CUDA"
    if nvidia_gpus(root):
        advice = "install a torch with CUDA (pytorch.org/get-started); until then the CPU computes"
        return GPU.warn("torch", f"{value}, beside an NVIDIA GPU", advice)
    return GPU.ok("torch", value)


def driver_version(root: Path) -> str | None:
    """Of NVIDIA's kernel module."""
    match = _MODULE.search(text(root / "proc/driver/nvidia/version") or "")
    return match[1] if match else None


def _driver(root: Path, facts: Cuda | None) -> Line:
    """NVIDIA's driver: the module in the kernel, and libcuda."""
    module = driver_version(root)
    supports = facts.supports if facts is not None else None
    if supports is not None:
        version = module or "version not shown"
        return GPU.ok("driver", f"{version}, for CUDA up to {_cuda(supports)}")
    there = nvidia_gpus(root)
    if module is not None and facts is not None:
        return GPU.warn(
            "driver",
            f"{module}, but libcuda.so.1 is missing or does not fit it",
            "install the libraries of the same driver; start a container with --gpus all",
        )
    if module is not None:
        return GPU.ok("driver", module)
    if there:
        return GPU.warn(
            "driver",
            f"none, for the NVIDIA GPU at {', '.join(there)}",
            "install NVIDIA's driver; in a container start it with --gpus all",
        )
    return GPU.ok("driver", "none, and no NVIDIA GPU on the PCI bus")


def _cuda(version: int) -> str:
    """13000 → `13.0`."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _without_gpu(root: Path, facts: Cuda) -> list[Line]:
    """Why CUDA offers no GPU; nothing where the lines before have said it."""
    if not has_gpu(root):
        return [GPU.ok("GPUs", "none: the CPU computes"), GPU.ok("GDS", "off: no GPU to read into")]
    if facts.supports is None or facts.built_for is None:
        return []
    if facts.visible in ("", "-1"):
        return [GPU.ok("GPUs", f"hidden by CUDA_VISIBLE_DEVICES={facts.visible}")]
    remedy = f"update NVIDIA's driver, or install a torch built for CUDA {_cuda(facts.supports)}"
    if facts.visible is not None:
        remedy += f"; CUDA_VISIBLE_DEVICES={facts.visible} may hide what is there"
    return [GPU.fail("GPUs", facts.obstacle or "CUDA offers none", remedy)]


def _gpu(index: int, gpu: Gpu) -> Line:
    """A GPU's memory, and whether tierrun can compute on it."""
    name = f"GPU {index}"
    value = f"{gpu.name}, compute capability {'.'.join(map(str, gpu.capability))}"
    if gpu.obstacle is not None:
        advice = "use another device (--device cuda:N, --device cpu), or mend what it says"
        return GPU.fail(name, f"{value}: {gpu.obstacle}", advice)
    if gpu.free is None or gpu.total is None:
        return GPU.unknown(name, f"the memory of {value}")
    value += f", {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free"
    if 2 * gpu.free < gpu.total:
        advice = "nvidia-smi shows who has the rest: what is free is all that experts get"
        return GPU.warn(name, value, advice)
    return GPU.ok(name, value)


def gpu_link(root: Path, gpu: Gpu, facts: Cuda) -> Link:
    """As nvidia-smi told it while copies ran, else from /sys."""
    if gpu.address is None:
        return Link(None, None, None, None)
    virtual = in_virtual_machine(root)
    shown = sysfs_link((root / "sys/bus/pci/devices" / gpu.address).resolve())
    told = next((link for link in facts.links or () if link.address == gpu.address), None)
    if told is None or told.generation is None or told.width is None:
        return shown._replace(excuse=VIRTUAL if virtual else AT_REST)
    return _told_link(told, None if virtual else shown)


def _told_link(told: SmiLink, shown: Link | None) -> Link:
    """nvidia-smi's maxima are what GPU and slot can do together; what the GPU could do in another
    slot is in /sys alone (`shown`)."""
    generations = [told.most_generation, shown.most_generation if shown else None]
    widths = [told.most_width, shown.most_width if shown else None]
    return Link(
        told.generation,
        told.width,
        max((n for n in generations if n is not None), default=None),
        max((n for n in widths if n is not None), default=None),
        slot_generation=told.most_generation,
        excuse=None if told.loaded else AT_REST,
    )


def _moving(facts: Cuda, problem: str) -> list[Line]:
    """Pinned memory and GPUDirect Storage."""
    if all(gpu.obstacle is not None for gpu in facts.gpus or ()):
        return []
    lines = [_pinned(facts, problem)]
    if facts.gds is None:
        return [*lines, GPU.unknown("GDS", problem or "not tried")]
    if facts.gds.native:
        return [*lines, GPU.ok("GDS", f"native ({facts.gds.reason})")]
    how = "not native" if facts.gds.usable else "off"
    value = f"{how}: {facts.gds.reason}; reads go through pinned RAM"
    return [*lines, GPU.ok("GDS", value)]


def _pinned(facts: Cuda, problem: str) -> Line:
    if facts.pinned is None:
        return GPU.unknown("pinned memory", problem or "not tried")
    value = format_bytes(facts.pinned.nbytes)
    if facts.pinned.obstacle is None:
        return GPU.ok("pinned memory", f"{value} pinned at once, more was not tried")
    return GPU.warn(
        "pinned memory",
        f"{value}, then {facts.pinned.obstacle}",
        "keep --ram below it, or raise what limits it: the memory of the container or of WSL "
        "(.wslconfig); copies from memory that is not pinned make the model wait",
    )
