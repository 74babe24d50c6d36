"""The CPU's lines, from files of machines that are not this one."""

from pathlib import Path

import pytest
from tests.tools.doctor.trees import (
    EPYC,
    GRAVITON,
    HASWELL,
    NEHALEM,
    cpuinfo,
    plant,
    topology,
)

from tierrun.tools.doctor.processor import cores, governor, instructions, numa_nodes

CPU = "sys/devices/system/cpu"


@pytest.mark.parametrize(
    ("flags", "label", "status", "value"),
    [
        (EPYC, "flags", "ok", "Some CPU: AVX2, AVX-512, VNNI, BF16; no AMX"),
        (f"{EPYC} amx_tile amx_int8", "flags", "ok", "Some CPU: AVX2, AVX-512, VNNI, BF16, AMX"),
        (HASWELL, "flags", "ok", "Some CPU: AVX2; no AVX-512, VNNI, BF16, AMX"),
        (f"{HASWELL} avx_vnni", "flags", "ok", "Some CPU: AVX2, VNNI; no AVX-512, BF16, AMX"),
        (f"{HASWELL} avx512f", "flags", "ok", "Some CPU: AVX2; no AVX-512, VNNI, BF16, AMX"),
        (NEHALEM, "flags", "warn", "Some CPU: no vector instructions beyond SSE"),
        (GRAVITON, "Features", "ok", "Some CPU: NEON, dotprod, I8MM, BF16, SVE"),
        ("fp asimd", "Features", "ok", "Some CPU: NEON; no dotprod, I8MM, BF16, SVE"),
        ("rv64imafdc", "isa", "unknown", "/proc/cpuinfo lists none"),
    ],
)
def test_instructions(tmp_path: Path, flags: str, label: str, status: str, value: str) -> None:
    line = instructions(plant(tmp_path, cpuinfo(flags, label)))
    assert (line.status, line.value) == (status, value)


def test_instructions_where_there_is_no_cpuinfo(tmp_path: Path) -> None:
    assert instructions(tmp_path).status == "unknown"


@pytest.mark.parametrize(
    ("siblings", "usable", "value"),
    [
        (["0", "1"], {0, 1}, "2 cores, no SMT"),
        (["0"], {0}, "1 core, no SMT"),
        (["0,2", "1,3", "0,2", "1,3"], {0, 1, 2, 3}, "2 cores, SMT, 4 CPUs"),
        (["0,2", "1,3", "0,2", "1,3"], {0, 2}, "2 cores, SMT, 4 CPUs; 2 usable (CPU affinity)"),
    ],
)
def test_cores(tmp_path: Path, siblings: list[str], usable: set[int], value: str) -> None:
    line = cores(plant(tmp_path, topology(siblings)), usable)
    assert (line.status, line.value) == ("ok", value)


@pytest.mark.parametrize("online", [None, "", "all", "0-1-2", "0-3"])
def test_cores_that_are_not_shown_are_not_guessed(tmp_path: Path, online: str | None) -> None:
    if online is not None:
        plant(tmp_path, {f"{CPU}/online": online})
    line = cores(tmp_path, {0, 1, 2})
    assert line.value.startswith("3 CPUs usable; ") and "core, " not in line.value


V2 = {"proc/self/cgroup": "0::/box\n"}
V1 = {"proc/self/cgroup": "3:cpu,cpuacct:/box\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        (V2 | {"sys/fs/cgroup/box/cpu.max": "200000 100000"}, 2),
        (V2 | {"sys/fs/cgroup/box/cpu.max": "50000 100000"}, 1),
        (V2 | {"sys/fs/cgroup/box/cpu.max": "max 100000"}, None),
        (V2 | {"sys/fs/cgroup/box/cpu.max": "300000 100000"}, None),
        (
            V2
            | {
                "sys/fs/cgroup/box/cpu.max": "max 100000",
                "sys/fs/cgroup/cpu.max": "250000 100000",
            },
            2,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_a_quota_below_the_default_number_of_threads_is_said(
    tmp_path: Path, files: dict[str, str], threads: int | None
) -> None:
    line = cores(plant(tmp_path, topology(["0", "1", "2", "3"]) | files), {0, 1, 2, 3})
    assert line.status == ("ok" if threads is None else "warn")
    assert threads is None or f"--threads {threads}:" in str(line.advice)


def test_numa_nodes(tmp_path: Path) -> None:
    assert numa_nodes(tmp_path).status == "unknown"
    node = "sys/devices/system/node"
    plant(tmp_path, {f"{node}/node0/cpulist": "0-3\n", f"{node}/possible": "0-1\n"})
    assert numa_nodes(tmp_path).value == "1 node"
    plant(tmp_path, {f"{node}/node10/cpulist": "\n", f"{node}/node2/cpulist": "4-7\n"})
    said = "3 nodes; CPUs of node 0: 0-3, node 2: 4-7, node 10: no CPUs"
    assert numa_nodes(tmp_path).value == said


@pytest.mark.parametrize(
    ("name", "driver", "preference", "status"),
    [
        ("performance", "acpi-cpufreq", None, "ok"),
        ("schedutil", "acpi-cpufreq", None, "ok"),
        ("powersave", "acpi-cpufreq", None, "warn"),
        ("powersave", None, None, "warn"),
        ("powersave", "intel_pstate", "balance_performance", "ok"),
        ("powersave", "amd-pstate-epp", None, "ok"),
        ("powersave", "amd-pstate-epp", "power", "warn"),
        ("performance", "intel_pstate", "performance", "ok"),
    ],
)
def test_governor(
    tmp_path: Path, name: str, driver: str | None, preference: str | None, status: str
) -> None:
    words = {
        "scaling_governor": name,
        "scaling_driver": driver,
        "energy_performance_preference": preference,
    }
    plant(tmp_path, {f"{CPU}/cpu0/cpufreq/{word}": v for word, v in words.items() if v is not None})
    line = governor(tmp_path)
    assert line.status == status and line.value.startswith(f"{name} (")


def test_one_cpu_at_its_lowest_clock_is_enough(tmp_path: Path) -> None:
    files = {f"{CPU}/cpu{i}/cpufreq/scaling_governor": g for i, g in enumerate(["powersave", "x"])}
    assert governor(plant(tmp_path, files)).status == "warn"


def test_a_governor_that_is_not_shown_is_unknown(tmp_path: Path) -> None:
    assert governor(tmp_path).value == "not shown here (no cpufreq)"
    plant(tmp_path, cpuinfo(f"{EPYC} hypervisor"))
    line = governor(tmp_path)
    assert (line.status, line.value) == (
        "unknown",
        "not shown here (virtual machine, whose host decides)",
    )
