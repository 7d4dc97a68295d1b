"""What the commands say about the NUMA nodes of the processors that this process may use."""

from collections.abc import Collection
from pathlib import Path

from nanovllm.model.machine import numa_nodes, usable_nodes


def numa_warning(command: str, root: Path = Path("/")) -> str | None:
    """Return a warning if the processors of this process are on several nodes, or None.

    Args:
        command: what the remedy starts, such as "nanovllm serve".
        root: folder that holds `sys`.
    """
    nodes = list(usable_nodes(root))
    if len(nodes) < 2:
        return None
    names = f"{', '.join(map(str, nodes[:-1]))} and {nodes[-1]}"
    return (
        f"warning: this process may use the processors of the NUMA nodes {names}, and reads the "
        "weights from the memory of one of them; run one process on each node, behind a balancer "
        f"or as replicas: numactl --cpunodebind={nodes[0]} --membind={nodes[0]} {command}"
    )


def describe_nodes(root: Path = Path("/")) -> str:
    """Return the nodes and their processors, such as "0: 0-3,8-11; 1: 4-7 (none usable)"."""
    usable = usable_nodes(root)
    parts = []
    for node, cpus in numa_nodes(root).items():
        mine = usable.get(node, set())
        note = "" if mine == cpus else f" ({_ranges(mine) or 'none'} usable)"
        parts.append(f"{node}: {_ranges(cpus) or 'memory only'}{note}")
    return "; ".join(parts)


def _ranges(numbers: Collection[int]) -> str:
    """Return numbers as Linux lists them, such as "0-3,8"."""
    firsts = sorted(number for number in numbers if number - 1 not in numbers)
    lasts = sorted(number for number in numbers if number + 1 not in numbers)
    return ",".join(
        f"{first}" if first == last else f"{first}-{last}"
        for first, last in zip(firsts, lasts, strict=True)
    )
