"""How many connections a server may have, and how it listens for them.

A process may open so many files, connections among them. At that limit asyncio tries to accept as often as the backlog is long, once a
second, and logs a traceback each time: with uvicorn's backlog of 2,048 that fills a disk. So the server closes idle connections before it
comes to that, its backlog is short, and what is logged nevertheless is one line a minute.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nanovllm.server.http.protocol import RareWarning

BACKLOG = 128
_WANTED_FILES = 65_536
_OTHER_FILES = 32  # that are opened later: threads, worker processes, the log


def raise_open_files_limit() -> int | None:
    """Let this process open as many files as the system allows it, up to 65,536; gives how many that is, None where there is no such limit."""
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if wanted > soft:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def connection_limits(max_files: int | None) -> tuple[int | None, int]:
    """How many connections fit into `max_files` open files, None for any number, and how many may wait to be accepted."""
    if max_files is None:
        return None, BACKLOG
    backlog = max(1, min(BACKLOG, max_files // 8))
    return max(1, max_files - _open_files() - _OTHER_FILES // 2 - backlog), backlog


def _open_files() -> int:
    """Files that this process has open; a guess where the system does not tell."""
    for folder in (Path("/proc/self/fd"), Path("/dev/fd")):
        with contextlib.suppress(OSError):
            return sum(1 for _ in folder.iterdir())
    return _OTHER_FILES


@contextlib.contextmanager
def listening_options(**options: Any) -> Iterator[None]:
    """Have servers that are created meanwhile on the running event loop take these options, for which uvicorn has no setting."""
    loop = asyncio.get_running_loop()
    create_server: Callable[..., Any] = loop.create_server
    loop.create_server = partial(create_server, **options)  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.create_server = create_server  # type: ignore[method-assign]


def log_full_system_rarely(loop: asyncio.AbstractEventLoop) -> None:
    """Log one line a minute, and no traceback, where a connection cannot be accepted for want of open files."""
    warn = RareWarning(
        "a connection cannot be accepted: too many files are open; raise the limit (ulimit -n)"
    )

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "system resource" in str(context.get("message")):
            warn()
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
