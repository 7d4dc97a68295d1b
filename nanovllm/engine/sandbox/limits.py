"""What a child process may use. Where the system lacks a limit, the parent's limit of time remains.

Processor time is limited by an interval timer whose signal ends the process: it holds inside of any library, and does not count the
time that the process waits for a busy machine.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STACK_BYTES = 8 << 20
MEMORY_EXIT_CODE = 86
"""Exit code of a worker in which Python ran out of memory."""


def limit_resources() -> None:
    """Bound the stack, and leave no core files."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    for name, limit in (("RLIMIT_CORE", 0), ("RLIMIT_STACK", STACK_BYTES)):
        with suppress(ValueError, OSError):
            _, most = resource.getrlimit(getattr(resource, name))
            resource.setrlimit(getattr(resource, name), (limit, most))


def limit_memory(more_bytes: int) -> None:
    """Let the address space of this process grow by `more_bytes`; does nothing but on Linux."""
    if sys.platform != "linux":
        return
    import resource  # noqa: PLC0415 - not on Windows

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if most < 0 else min(limit, most), most)
    )  # the hard limit stays, so that a later call can raise it again


def private_bytes() -> int:
    """Return the resident memory of this process that it shares with no file; 0 where unknown."""
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    import resource  # noqa: PLC0415 - not on Windows

    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()


@contextmanager
def cpu_limiter() -> Iterator[Callable[[float], object]]:
    """Yield a function that ends this process after so many more seconds of processor time.

    Each call replaces the limit of the previous one. No limit holds after the block.
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
    """End this process where the block takes more than `limit_s` of processor time in it."""
    with cpu_limiter() as limit:
        limit(limit_s)
        yield


def lower_priority(nice: int) -> None:
    """Lower the priority of the calling thread; does nothing but on Linux, where threads have one each."""
    if sys.platform == "linux":
        import os  # noqa: PLC0415 - beside the only use

        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)


def reached_limit(exit_code: int | None) -> str | None:
    """Return the name of the limit that ended a process: "memory", "stack", "time"; None for another end.

    Args:
        exit_code: as `subprocess.Popen.returncode` gives it, negative for a signal; None where unknown.
    """
    if exit_code == MEMORY_EXIT_CODE:
        return "memory"
    names = {"SIGSEGV": "stack", "SIGBUS": "stack", "SIGABRT": "memory", "SIGPROF": "time"}
    found = {
        -getattr(signal, name): limit for name, limit in names.items() if hasattr(signal, name)
    }
    return None if exit_code is None else found.get(exit_code)
