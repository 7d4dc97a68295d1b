"""The limits of this process's memory, and how much of each it uses.

    control groups   memory.max (version 2) or memory.limit_in_bytes (version 1), of every ancestor
    RLIMIT_AS        address space
    RLIMIT_DATA      private writable memory
    the machine      physical memory

A control group's limit is for all of its processes. What the others use is not counted.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nanovllm.model.control_groups import control_groups

PHYSICAL_MEMORY = "physical memory"
_FILES = {1: "memory.limit_in_bytes", 2: "memory.max"}


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
    """Return the limit that is reached first; None where the system tells none.

    `root` is the folder that holds `proc` and `sys`.
    """
    return min(_limits(root), key=lambda limit: limit.free_bytes, default=None)


def _limits(root: Path) -> Iterator[MemoryLimit]:
    address_space, resident, data = _used(root)
    with suppress(AttributeError, ValueError, OSError):  # Windows
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield MemoryLimit(PHYSICAL_MEMORY, physical, resident)
    for folder, version in control_groups("memory", root):
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
