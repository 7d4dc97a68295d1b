"""The machine and this process's share of it: processor, cores, limits of memory.

A control group (cgroup, https://docs.kernel.org/admin-guide/cgroup-v2.html) limits the CPU time and
the memory of all of its processes. Both versions of them may be mounted at once. Linux only.

The default number of threads is one for each usable physical core: two threads on the two hardware
threads of a core share its arithmetic units and delay each other at every barrier. A control group
may have `quota` microseconds of CPU time every `period`.

Memory has these limits:

    control groups   memory.max (version 2) or memory.limit_in_bytes (version 1), of every ancestor
    RLIMIT_AS        address space
    RLIMIT_DATA      private writable memory
    the machine      physical memory

What other processes of a control group use is not counted.

Memory of a machine with several sockets is divided into NUMA nodes, each close to the processors of
one socket (https://docs.kernel.org/admin-guide/mm/numaperf.html).
"""

import ctypes
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PHYSICAL_MEMORY = "physical memory"
_FILES = {1: "memory.limit_in_bytes", 2: "memory.max"}


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


def numa_nodes(root: Path = Path("/")) -> dict[int, set[int]]:
    """Return the logical CPUs of each NUMA node; none for a node of memory alone.

    It is empty where the system tells of no nodes, as on all but Linux.

    Args:
        root: folder that holds `sys`.
    """
    nodes = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            nodes[int(folder.name.removeprefix("node"))] = read_ranges(
                (folder / "cpulist").read_text(encoding="ascii")
            )
    return dict(sorted(nodes.items()))


def usable_nodes(root: Path = Path("/")) -> dict[int, set[int]]:
    """Return those CPUs of each NUMA node that this process may run on, without nodes of none."""
    if sys.platform != "linux":
        return {}
    mask = os.sched_getaffinity(0)
    return {node: cpus & mask for node, cpus in numa_nodes(root).items() if cpus & mask}


def read_ranges(text: str) -> set[int]:
    """Return the numbers in a list such as "0-3,8"; raises ValueError."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


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
        for folder, version in _control_groups("cpu", root)
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


def _control_groups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folder of each group that this process is in, outermost first, and its version.

    A folder may be missing.

    Args:
        controller: "cpu" or "memory".
        root: folder that holds `proc` and `sys`.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        if line.count(":") < 2:
            continue
        number, controllers, group = line.split(":", 2)
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / ("" if version == 2 else controller)
        for name in ("", *group.strip("/").split("/")):
            folder /= name
            yield folder, version


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit.

    Attributes:
        name: what sets it.
        num_bytes: the limit.
        used_bytes: what counts against it now, of this process.
    """

    name: str
    num_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """Bytes until the limit; negative beyond it."""
        return self.num_bytes - self.used_bytes


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """Return the limit that is reached first; None if there is none.

    `root` is the folder that holds `proc` and `sys`.
    """
    return min(_limits(root), key=lambda limit: limit.free_bytes, default=None)


def _limits(root: Path) -> Iterator[MemoryLimit]:
    address_space, resident, data = _used(root)
    with suppress(AttributeError, ValueError, OSError):  # Windows
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield MemoryLimit(PHYSICAL_MEMORY, physical, resident)
    for folder, version in _control_groups("memory", root):
        with suppress(OSError, ValueError):  # no file, or "max"
            limit = int((folder / _FILES[version]).read_text())
            yield MemoryLimit(f"{folder / _FILES[version]}", limit, resident)
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    for name, used in (("RLIMIT_AS", address_space), ("RLIMIT_DATA", data)):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            yield MemoryLimit(f"{name} (ulimit)", soft, used)


def _used(root: Path) -> tuple[int, int, int]:
    """Return the bytes of address space, resident memory and data of this process; 0 if unknown."""
    try:
        pages = (root / "proc/self/statm").read_text().split()
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        return int(pages[0]) * page_bytes, int(pages[1]) * page_bytes, int(pages[5]) * page_bytes
    except (OSError, ValueError, IndexError, AttributeError):
        return 0, 0, 0


def return_freed_memory() -> None:
    """Return the C library's freed memory to the operating system; only glibc can.

    glibc keeps freed memory for later allocations. After a model is freed that is hundreds of
    megabytes, because glibc raises its mmap threshold with every large block that is freed.
    """
    if sys.platform != "linux" or sys.is_finalizing():
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
