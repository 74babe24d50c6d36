"""Machines made of files: what /proc, /sys and /dev show of them, under a directory."""

from collections.abc import Mapping
from pathlib import Path

HASWELL = "fpu sse2 ssse3 fma avx avx2"
EPYC = f"{HASWELL} avx512f avx512dq avx512bw avx512vl avx_vnni avx512_bf16 avx512_vnni"
NEHALEM = "fpu sse2 ssse3 sse4_2"
GRAVITON = "fp asimd asimddp sve i8mm bf16"


def plant(root: Path, files: Mapping[str, str]) -> Path:
    """Write `files` (path under `root` → content); `→ target` as content makes a link."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith("→ "):
            path.symlink_to(content.removeprefix("→ "))
        else:
            path.write_text(content)
    return root


def cpuinfo(flags: str, label: str = "flags", model: str = "Some CPU") -> dict[str, str]:
    """/proc/cpuinfo of two CPUs."""
    one = f"processor\t: 0\nmodel name\t: {model}\n{label}\t\t: {flags}\n\n"
    return {"proc/cpuinfo": one * 2}


def topology(siblings: list[str]) -> dict[str, str]:
    """CPU i shares its core with `siblings[i]`."""
    here = "sys/devices/system/cpu"
    files = {f"{here}/online": f"0-{len(siblings) - 1}\n"}
    for cpu, listed in enumerate(siblings):
        files[f"{here}/cpu{cpu}/topology/thread_siblings_list"] = f"{listed}\n"
    return files


def meminfo(total: int, available: int, swap_total: int = 0, swap_free: int = 0) -> dict[str, str]:
    """/proc/meminfo, from bytes."""
    sizes = {"MemTotal": total, "MemAvailable": available}
    sizes |= {"SwapTotal": swap_total, "SwapFree": swap_free}
    rows = (f"{name}:    {nbytes // 1024} kB" for name, nbytes in sizes.items())
    return {"proc/meminfo": "\n".join(rows) + "\n"}


def huge_pages(mode: str, sized: str = "inherit") -> dict[str, str]:
    """Transparent huge pages: the machine's choice, and that for pages of 2 MiB."""
    here = "sys/kernel/mm/transparent_hugepage"
    every = "always madvise never"
    return {
        f"{here}/enabled": every.replace(mode, f"[{mode}]"),
        f"{here}/hpage_pmd_size": "2097152\n",
        f"{here}/hugepages-2048kB/enabled": f"always inherit {every[7:]}".replace(
            sized, f"[{sized}]"
        ),
    }


def mountinfo(*mounts: tuple[str, str, str, str]) -> dict[str, str]:
    """/proc/self/mountinfo, from (number, mount point, filesystem, source)."""
    rows = (
        f"{20 + i} 1 {number} / {point} rw,relatime shared:{i} - {kind} {source} rw,x=remount-ro"
        for i, (number, point, kind, source) in enumerate(mounts)
    )
    return {"proc/self/mountinfo": "\n".join(rows) + "\n"}


def link(device: str, now: tuple[str, str], most: tuple[str, str]) -> dict[str, str]:
    """The PCIe link of the device at `device`: (speed, width), as sysfs writes them."""
    words = ("current_link_speed", "current_link_width", "max_link_speed", "max_link_width")
    return {
        f"{device}/{word}": f"{value}\n" for word, value in zip(words, (*now, *most), strict=True)
    }


PORT = "sys/devices/pci0000:00/0000:00:01.0"


def nvme(
    name: str, number: str, address: str = "0000:01:00.0", model: str = "990 PRO"
) -> dict[str, str]:
    """An NVMe drive `name` (nvme0) with a namespace and a partition of it, `number` its minor."""
    pci = f"{PORT}/{address}"
    disk = f"{pci}/nvme/{name}/{name}n1"
    return {
        f"{pci}/nvme/{name}/transport": "pcie\n",
        f"{pci}/nvme/{name}/model": f"{model}   \n",
        f"{pci}/nvme/{name}/device": "→ ../..",
        f"{disk}/device": "→ ..",
        f"{disk}/queue/rotational": "0\n",
        f"{disk}/{name}n1p1/partition": "1\n",
        f"sys/dev/block/259:{number}": f"→ ../../../{disk}",
        f"sys/dev/block/259:{int(number) + 1}": f"→ ../../../{disk}/{name}n1p1",
        f"sys/class/block/{name}n1p1": f"→ ../../../{disk}/{name}n1p1",
    }


def disk(name: str, number: str, rotational: str, **words: str) -> dict[str, str]:
    """A disk that is no NVMe one; `words` are files of its device, like vendor and model."""
    here = f"sys/devices/pci0000:00/host0/block/{name}"
    files = {f"{here}/device/{word}": f"{value}  \n" for word, value in words.items()}
    return files | {
        f"{here}/queue/rotational": f"{rotational}\n",
        f"sys/dev/block/{number}": f"→ ../../../{here}",
        f"sys/class/block/{name}": f"→ ../../../{here}",
    }


H100_ADDRESS = "0000:00:05.0"
NVIDIA_VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@a)\n"
    "GCC version:  gcc version 13.3.0\n"
)


def nvidia_pci(address: str = H100_ADDRESS) -> dict[str, str]:
    """An NVIDIA GPU on the PCI bus, and beside it what is none: its audio, an Intel bridge."""
    bus = "sys/bus/pci/devices"
    return {
        f"{bus}/{address}/vendor": "0x10de\n",
        f"{bus}/{address}/class": "0x030200\n",
        f"{bus}/{address[:-1]}1/vendor": "0x10de\n",
        f"{bus}/{address[:-1]}1/class": "0x040300\n",
        f"{bus}/0000:00:00.0/vendor": "0x8086\n",
        f"{bus}/0000:00:00.0/class": "0x060000\n",
    }
