"""Resource limits of a child process. Where the system lacks one, the parent's timeout remains.

Processor time is limited by an interval timer whose signal ends the process. This works inside any
library, and time in which the process does not run does not count.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STACK_BYTES = 8 << 20
_MAX_OOM_SCORE = 1000  # proc_pid_oom_score_adj(5)
MEMORY_EXIT_CODE = 86
"""Exit code of a worker whose Python raised MemoryError."""


def limit_resources() -> None:
    """Limit the stack, disable core files, and be killed before the parent if memory runs out."""
    with suppress(OSError):  # Linux only
        Path("/proc/self/oom_score_adj").write_text(str(_MAX_OOM_SCORE), encoding="ascii")
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    for name, limit in (("RLIMIT_CORE", 0), ("RLIMIT_STACK", STACK_BYTES)):
        with suppress(ValueError, OSError):
            _, hard_limit = resource.getrlimit(getattr(resource, name))
            resource.setrlimit(getattr(resource, name), (limit, hard_limit))


def limit_memory(more_bytes: int) -> None:
    """Let the address space of this process grow by `more_bytes`. Linux only."""
    if sys.platform != "linux":
        return
    import resource  # noqa: PLC0415 - not on Windows

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)  # kept, so a later call can raise it
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard_limit < 0 else min(limit, hard_limit), hard_limit)
    )


def private_bytes() -> int:
    """Return the resident memory of this process without file mappings; 0 where unknown."""
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    import resource  # noqa: PLC0415 - not on Windows

    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()


def release_memory() -> None:
    """Return the memory that the allocator keeps to the system. Only glibc can."""
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - rarely needed

        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def cpu_limiter() -> Iterator[Callable[[float], object]]:
    """Yield a function that sets the remaining processor time of this process, in seconds.

    Each call replaces the previous limit. The limit is removed after the block.
    """
    if not hasattr(signal, "setitimer"):
        yield lambda limit_s: None
        return
    try:
        yield lambda limit_s: signal.setitimer(signal.ITIMER_PROF, limit_s)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


@contextmanager
def limited_cpu(limit_s: float) -> Iterator[None]:
    """End this process if the block takes more than `limit_s` of its processor time."""
    with cpu_limiter() as limit:
        limit(limit_s)
        yield


def lower_priority(nice: int) -> None:
    """Lower the priority of the calling thread. Linux only, where each thread has its own."""
    if sys.platform == "linux":
        import os  # noqa: PLC0415 - beside the only use

        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)


def reached_limit(exit_code: int | None) -> str | None:
    """Return the limit that ended a process, "memory", "stack" or "time"; None for another cause.

    `exit_code` is as in `subprocess.Popen.returncode`, negative for a signal; None where unknown.
    """
    if exit_code == MEMORY_EXIT_CODE:
        return "memory"
    names = {"SIGSEGV": "stack", "SIGBUS": "stack", "SIGABRT": "memory", "SIGPROF": "time"}
    limits = {
        -getattr(signal, name): limit for name, limit in names.items() if hasattr(signal, name)
    }
    return None if exit_code is None else limits.get(exit_code)
