"""The limits of memory, on machines simulated by files and on this one."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from nanovllm.model.memory_limit import PHYSICAL_MEMORY, MemoryLimit, memory_limit

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
STATM = {"proc/self/statm": "5000 200 100 1 0 900 0\n"}
V1 = "sys/fs/cgroup/memory"


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in {**STATM, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


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
    limit = memory_limit(write(tmp_path, files))
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
    limit = memory_limit(write(tmp_path, files))
    assert limit is not None
    assert limit.name == PHYSICAL_MEMORY


def test_a_limit_of_the_process_counts_its_address_space_or_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    limits = {resource.RLIMIT_AS: 6000 * PAGE, resource.RLIMIT_DATA: 1400 * PAGE}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], -1))
    root = write(tmp_path, {})
    assert memory_limit(root) == MemoryLimit("RLIMIT_DATA (ulimit)", 1400 * PAGE, 900 * PAGE)
    limits[resource.RLIMIT_DATA] = resource.RLIM_INFINITY
    assert memory_limit(root) == MemoryLimit("RLIMIT_AS (ulimit)", 6000 * PAGE, 5000 * PAGE)


def test_this_process_is_below_the_limit_of_this_machine() -> None:
    limit = memory_limit()
    if limit is None:
        pytest.skip("this system tells no limit")
    assert 1 << 20 < limit.used_bytes < limit.num_bytes
