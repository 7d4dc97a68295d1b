"""The control groups (cgroups) of this process, which limit its share of the machine. Linux only.

https://docs.kernel.org/admin-guide/cgroup-v2.html; both versions may be mounted at once.
"""

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
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
