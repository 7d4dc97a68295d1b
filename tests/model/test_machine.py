"""Cores and limits of memory, on machines simulated by files and on this one."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from nanovllm.model.machine import (
    PHYSICAL_MEMORY,
    MemoryLimit,
    cpu_name,
    default_threads,
    linux_threads,
    memory_limit,
)

TOPOLOGY = "sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
PAIRS = {TOPOLOGY.format(cpu=cpu): f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)}
"""Four cores of two hardware threads each: CPUs 0 and 4 are one core."""
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
STATM = {"proc/self/statm": "5000 200 100 1 0 900 0\n"}
V1 = "sys/fs/cgroup/memory"


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [({0}, 1), ({0, 4}, 1), ({0, 1}, 2), ({0, 1, 4, 5}, 2), (set(range(8)), 4), ({8, 9, 10}, 3)],
)
def test_two_threads_of_a_core_count_once(tmp_path: Path, cpus: set[int], expected: int) -> None:
    assert linux_threads(cpus, write(tmp_path, PAIRS)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4),
        ({"proc/self/cgroup": "0::/\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000\n"}, 4),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "100000 50000\n"}, 2),
        ({"proc/self/cgroup": "0::/../other\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 4),
        ({"proc/self/cgroup": "nonsense\n"}, 4),
    ],
)
def test_a_share_of_the_machine_is_respected(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert linux_threads(range(8), write(tmp_path, {**PAIRS, **files})) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("200000", 2), ("10000", 1)])
@pytest.mark.parametrize("group", ["/", "/docker/ab"])
def test_the_older_control_groups_are_respected(
    tmp_path: Path, quota: str, expected: int, group: str
) -> None:
    folder = "sys/fs/cgroup/cpu" + group.rstrip("/")
    files = {
        "proc/self/cgroup": f"12:memory:{group}\n4:cpu,cpuacct:{group}\n1:name=systemd:{group}\n",
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": "100000\n",
    }
    assert linux_threads(range(8), write(tmp_path, {**PAIRS, **files})) == expected


def test_this_machine_has_at_least_one() -> None:
    assert default_threads() >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_the_processor_has_the_name_that_the_system_shows() -> None:
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    assert cpu_name() == (names or [platform.processor() or platform.machine()])[0].strip()


@pytest.mark.parametrize(
    ("files", "name", "num_bytes"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "4096\n"}, "memory.max", 4096),
        (
            {
                "proc/self/cgroup": "0::/pod/server\n",
                "sys/fs/cgroup/memory.max": "9000000\n",
                "sys/fs/cgroup/pod/memory.max": "8000000\n",
                "sys/fs/cgroup/pod/server/memory.max": "max\n",
            },
            "pod/memory.max",
            8_000_000,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/docker/ab\n0::/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/docker/ab/memory.limit_in_bytes": "7000000\n",
            },
            "memory/docker/ab/memory.limit_in_bytes",
            7_000_000,
        ),
    ],
)
def test_the_smallest_limit_of_the_control_groups_counts(
    tmp_path: Path, files: dict[str, str], name: str, num_bytes: int
) -> None:
    limit = memory_limit(write(tmp_path, {**STATM, **files}))
    assert limit is not None
    assert limit.name.endswith(name)
    assert (limit.num_bytes, limit.used_bytes) == (num_bytes, 200 * PAGE)
    assert limit.free_bytes == num_bytes - 200 * PAGE


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
        {"proc/self/cgroup": "nonsense\n0::/a\n", "sys/fs/cgroup/a/memory.max": "nonsense\n"},
        {"proc/self/cgroup": "4:memory:/\n", f"{V1}/memory.limit_in_bytes": f"{2**63 - PAGE}\n"},
        {"proc/self/statm": "nonsense"},
    ],
)
def test_without_a_limit_the_machine_has_one(tmp_path: Path, files: dict[str, str]) -> None:
    limit = memory_limit(write(tmp_path, {**STATM, **files}))
    assert limit is not None
    assert limit.name == PHYSICAL_MEMORY


def test_a_limit_of_the_process_counts_its_address_space_or_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    limits = {resource.RLIMIT_AS: 6000 * PAGE, resource.RLIMIT_DATA: 1400 * PAGE}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], -1))
    root = write(tmp_path, STATM)
    assert memory_limit(root) == MemoryLimit("RLIMIT_DATA (ulimit)", 1400 * PAGE, 900 * PAGE)
    limits[resource.RLIMIT_DATA] = resource.RLIM_INFINITY
    assert memory_limit(root) == MemoryLimit("RLIMIT_AS (ulimit)", 6000 * PAGE, 5000 * PAGE)


def test_this_process_is_below_the_limit_of_this_machine() -> None:
    limit = memory_limit()
    if limit is None:
        pytest.skip("this system tells no limit")
    assert 1 << 20 < limit.used_bytes < limit.num_bytes
