"""The CPU: what it can compute with, how many of it there are, and how fast it may run."""

from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from tierrun.tiers.budget import cgroups
from tierrun.tools.doctor.files import cpu_list, fields, number, text
from tierrun.tools.doctor.line import Area, Line

PROCESSOR = Area("processor")

_X86 = {
    "AVX2": [{"avx2", "fma"}],
    "AVX-512": [{"avx512f", "avx512bw", "avx512dq", "avx512vl"}],
    "VNNI": [{"avx512_vnni"}, {"avx_vnni"}],
    "BF16": [{"avx512_bf16"}],
    "AMX": [{"amx_tile", "amx_int8"}],
}
_ARM = {
    "NEON": [{"asimd"}],
    "dotprod": [{"asimddp"}],
    "I8MM": [{"i8mm"}],
    "BF16": [{"bf16"}],
    "SVE": [{"sve"}],
}
_SCALING_BY_ITSELF = ("intel_pstate", "amd-pstate-epp")
"""Drivers whose `powersave` goes up to full speed under load; of others it is the lowest speed."""


def processor_lines(root: Path, usable: Set[int]) -> list[Line]:
    """Everything about the CPUs; `usable` are those that this process may run on."""
    return [instructions(root), cores(root, usable), numa_nodes(root), governor(root)]


def in_virtual_machine(root: Path) -> bool:
    """Whether the CPU says that a hypervisor runs it."""
    return "hypervisor" in _flags(root)


def _flags(root: Path) -> frozenset[str]:
    found = fields(root / "proc/cpuinfo")
    return frozenset((found.get("flags") or found.get("Features") or "").split())


def instructions(root: Path) -> Line:
    """Which vector instructions there are."""
    flags = _flags(root)
    known = _X86 if "sse2" in flags else _ARM if "asimd" in flags else None
    if known is None:
        return PROCESSOR.unknown("instructions", "/proc/cpuinfo lists none")
    there = [name for name, sets in known.items() if any(one <= flags for one in sets)]
    missing = [name for name in known if name not in there]
    model = fields(root / "proc/cpuinfo").get("model name")
    value = f"{model}: " if model else ""
    value += ", ".join(there) or "no vector instructions beyond SSE"
    value += f"; no {', '.join(missing)}" if there and missing else ""
    if known is _X86 and "AVX2" not in there:
        return PROCESSOR.warn(
            "instructions",
            value,
            "without AVX2 what the CPU computes is slow; in a virtual machine let it see the "
            "host's CPU (for QEMU: -cpu host)",
        )
    return PROCESSOR.ok("instructions", value)


class _Topology(NamedTuple):
    cpus: int
    cores: int


def cores(root: Path, usable: Set[int]) -> Line:
    """How many cores and CPUs there are, and how many of them this process may use."""
    topology = _topology(root)
    if topology is None:
        value = f"{len(usable)} CPUs usable; which of them share a core is not shown"
    else:
        cpus, whole = topology
        smt = f"SMT, {cpus} CPUs" if cpus > whole else "no SMT"
        value = f"{whole} core{'s' * (whole != 1)}, {smt}"
        value += "" if cpus == len(usable) else f"; {len(usable)} usable (CPU affinity)"
    quota = _quota(root)
    threads = max(1, len(usable) - 1)
    if quota is not None and quota < threads:
        return PROCESSOR.warn(
            "cores",
            f"{value}; the cgroup's quota is {quota:.3g} CPUs",
            f"give --threads {max(1, int(quota))}: {threads} threads, the default here, would be "
            "stopped in turns",
        )
    return PROCESSOR.ok("cores", value)


def _topology(root: Path) -> _Topology | None:
    here = root / "sys/devices/system/cpu"
    online = cpu_list(text(here / "online") or "")
    siblings = {text(here / f"cpu{cpu}/topology/thread_siblings_list") for cpu in online}
    return None if not siblings or None in siblings else _Topology(len(online), len(siblings))


def _quota(root: Path) -> float | None:
    """CPUs' worth of time that the tightest cgroup allows; None where none limits it."""
    limits = [limit for directory in cgroups(root, "cpu") for limit in _quotas(directory)]
    return min(limits, default=None)


def _quotas(directory: Path) -> list[float]:
    """The quota of a cgroup, v2 or v1, if it has one."""
    quota, _, period = (text(directory / "cpu.max") or "").partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period):
        return [int(quota) / int(period)]
    old, old_period = (number(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return [old / old_period] if old and old_period else []


def numa_nodes(root: Path) -> Line:
    """Which CPUs are near which memory."""
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=_node_number)
    if not nodes:
        return PROCESSOR.unknown("NUMA", "/sys/devices/system/node lists no node")
    if len(nodes) == 1:
        return PROCESSOR.ok("NUMA", "1 node")
    listed = (f"node {_node_number(node)}: {text(node / 'cpulist') or 'no CPUs'}" for node in nodes)
    return PROCESSOR.ok("NUMA", f"{len(nodes)} nodes; CPUs of {', '.join(listed)}")


def _node_number(node: Path) -> int:
    return int(node.name.removeprefix("node"))


def governor(root: Path) -> Line:
    """Who decides about the clock."""
    cpus = root / "sys/devices/system/cpu"
    found = sorted(set(filter(None, map(text, cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")))))
    if not found:
        where = "virtual machine, whose host decides" if in_virtual_machine(root) else "no cpufreq"
        return PROCESSOR.unknown("governor", f"not shown here ({where})")
    driver = text(cpus / "cpu0/cpufreq/scaling_driver") or "driver not shown"
    preference = text(cpus / "cpu0/cpufreq/energy_performance_preference")
    value = f"{', '.join(found)} ({driver}{f', {preference}' if preference else ''})"
    itself = driver in _SCALING_BY_ITSELF and preference != "power"
    slow = "powersave" in found and not itself
    if slow:
        return PROCESSOR.warn(
            "governor", value, "cpupower frequency-set -g performance, as root, for full clocks"
        )
    return PROCESSOR.ok("governor", value)
