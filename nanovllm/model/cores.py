"""The processor's name, and the default number of threads: one for each usable physical core.

Two threads on the two hardware threads of a core share its arithmetic units and delay each other at
every barrier. A container's share of the machine is in its control group (cgroup): `quota`
microseconds of CPU time every `period`.
"""

import ctypes
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from nanovllm.model.control_groups import control_groups


def cpu_name() -> str:
    """Return the name of the processor, such as "AMD Ryzen 7 5800X 8-Core Processor"."""
    if sys.platform == "linux":
        with suppress(OSError):
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(
                ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
    return platform.processor() or platform.machine()


def default_threads() -> int:
    """Return the physical cores that this process may use, within its cgroup quota; at least 1."""
    if sys.platform == "linux":
        return linux_threads(os.sched_getaffinity(0), Path("/"))
    return (_mac_cores() if sys.platform == "darwin" else None) or usable_cpus()


def usable_cpus() -> int:
    """Return the logical CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def linux_threads(cpus: Iterable[int], root: Path) -> int:
    """Return `default_threads` for the logical CPUs of an affinity mask, read below `root`."""
    cores = {_siblings(cpu, root) for cpu in cpus}
    return max(1, math.floor(min([len(cores), *_quotas(root)])))


def _siblings(cpu: int, root: Path) -> str:
    """Return the logical CPUs of a CPU's core, or the CPU alone where Linux does not tell."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    try:
        return (topology / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quotas(root: Path) -> list[float]:
    """Return the CPUs' worth of time that each cgroup of this process allows."""
    quotas = (
        _quota_version_2(folder) if version == 2 else _quota_version_1(folder)
        for folder, version in control_groups("cpu", root)
    )
    return [quota for quota in quotas if quota is not None]


def _quota_version_2(folder: Path) -> float | None:
    """Read cpu.max, which holds "max 100000" or "150000 100000"."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_version_1(folder: Path) -> float | None:
    """Read cpu.cfs_quota_us, where -1 means no quota, and cpu.cfs_period_us."""
    try:
        quota, period = (
            int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def _mac_cores() -> int | None:
    """Return a Mac's performance cores, or all: efficiency cores would delay every barrier."""
    library = ctypes.CDLL(None)
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        count, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        status = library.sysctlbyname(name, ctypes.byref(count), ctypes.byref(size), None, 0)
        if status == 0 and count.value > 0:
            return count.value
    return None
