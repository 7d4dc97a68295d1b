"""How many threads pay: one for each core that this process may really use.

Two threads on the two halves of one core share its arithmetic and get in each other's way at every barrier. A container's share of the
machine is in its control group: `quota` microseconds of processor time every `period`.
"""

import ctypes
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path


def default_threads() -> int:
    """Physical cores that this process may use, and no more than its share of them; at least 1."""
    if sys.platform == "linux":
        return linux_threads(os.sched_getaffinity(0), Path("/"))
    return (_mac_cores() if sys.platform == "darwin" else None) or usable_cpus()


def usable_cpus() -> int:
    """Processors that this process may run on, two for a core that has two threads."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def linux_threads(processors: Iterable[int], root: Path) -> int:
    """As default_threads, for a process that may run on `processors`, by the files that Linux has below `root`."""
    cores = {_siblings(processor, root) for processor in processors}
    return max(1, math.floor(min([len(cores), *_quotas(root)])))


def _siblings(processor: int, root: Path) -> str:
    """A name of the core that a processor is a thread of; without a word from the system, every one is a core."""
    try:
        return (
            (root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
            .read_text()
            .strip()
        )
    except OSError:
        return str(processor)


def _quotas(root: Path) -> list[float]:
    """Processors' worth of time that each control group which this process is in allows it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for number, controllers, group in (
        line.split(":", 2) for line in lines if line.count(":") >= 2
    ):
        is_second = number == "0" and not controllers
        if not is_second and "cpu" not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / ("" if is_second else "cpu")
        for name in ("", *group.strip("/").split("/")):
            folder /= name
            quotas.append(_version_2(folder) if is_second else _version_1(folder))
    return [quota for quota in quotas if quota is not None]


def _version_2(folder: Path) -> float | None:
    """cpu.max holds "max 100000" or "150000 100000"."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _version_1(folder: Path) -> float | None:
    """A quota of -1 is none."""
    try:
        quota, period = (
            int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def _mac_cores() -> int | None:
    """The fast cores of a Mac with two kinds, since the slow ones would hold up every barrier; otherwise all."""
    library = ctypes.CDLL(None)
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        count, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        if (
            library.sysctlbyname(name, ctypes.byref(count), ctypes.byref(size), None, 0) == 0
            and count.value > 0
        ):
            return count.value
    return None
