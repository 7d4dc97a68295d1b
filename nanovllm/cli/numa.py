"""NUMA nodes of the processors that this process may use."""

import contextlib
import os
import re
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def numa_nodes(cpus: set[int], nodes: Path = _NODES) -> list[int]:
    """Return the numbers of the nodes that have one of `cpus`; none where the system has no list.

    `nodes` has a folder node0, node1, ... for each node, with a file `cpulist` such as 0-3,8-11.
    """
    found = []
    for folder in nodes.glob("node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if cpus & _read_list((folder / "cpulist").read_text(encoding="ascii")):
                found.append(int(re.sub(r"\D", "", folder.name)))
    return sorted(found)


def numa_warning(nodes: Path = _NODES) -> str | None:
    """Return a warning if the processors of this process are on several nodes, or None."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    found = numa_nodes(os.sched_getaffinity(0), nodes)
    if len(found) < 2:
        return None
    names = f"{', '.join(map(str, found[:-1]))} and {found[-1]}"
    return (
        f"warning: this process may use the processors of the NUMA nodes {names}, and reads the "
        "weights from the memory of one of them; run a server on each node: "
        f"numactl -N {found[0]} -m {found[0]} nanovllm serve"
    )


def _read_list(text: str) -> set[int]:
    """Return the numbers of a list of ranges; raises ValueError."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers
