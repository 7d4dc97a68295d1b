"""Limits on connections, and options of listening sockets.

A process may open a limited number of files, and a connection is one. At the limit asyncio tries to
accept the whole backlog once a second and logs a traceback for each attempt: with uvicorn's backlog
of 2,048 that fills a disk. The server therefore closes idle connections below the limit, has a
short backlog, and logs at most one line a minute.
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nanovllm.server.http.protocol import RareWarning

BACKLOG = 128
_MAX_OPEN_FILES = 65_536
_OTHER_FILES = 32  # opened later: threads, worker processes, the log


def bind(host: str, port: int) -> list[socket.socket]:
    """Return sockets that are bound to each address of a host; raises OSError with the remedy.

    This precedes the model, so that a port in use is an error before any work. A name such as
    localhost may have an address of a protocol that this machine lacks, which is left out.
    """
    sockets: list[socket.socket] = []
    reason: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                created = socket.create_server(address, family=family)
                # asyncio turns off Nagle's algorithm only where the protocol is given. It would
                # delay each response by 40 ms on connections that are kept alive.
                sockets.append(socket.socket(family, kind, protocol, fileno=created.detach()))
            except OSError as error:
                reason = error
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        if sockets:
            return sockets
    except OSError as error:
        reason = error
    for one in sockets:
        one.close()
    assert reason is not None
    remedy = "choose an address of this machine by --host, or another port by --port"
    if reason.errno == errno.EADDRINUSE:
        remedy = "stop the process that listens there, or choose another by --port"
    is_unknown_host = isinstance(reason, socket.gaierror)
    text = reason.strerror if is_unknown_host else os.strerror(reason.errno or 0)
    raise OSError(f"cannot listen on {host} port {port}: {str(text).lower()}; {remedy}") from reason


def raise_open_files_limit() -> int | None:
    """Raise the soft limit on open files towards 65,536 and return it; None if there is none."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    target = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if target > soft:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def connection_limits(max_files: int | None) -> tuple[int | None, int]:
    """Return the maximum connections for `max_files` open files, or None, and the backlog."""
    if max_files is None:
        return None, BACKLOG
    backlog = max(1, min(BACKLOG, max_files // 8))
    return max(1, max_files - _open_files() - _OTHER_FILES // 2 - backlog), backlog


def _open_files() -> int:
    """Return the number of open files; a guess where the system does not tell."""
    for folder in (Path("/proc/self/fd"), Path("/dev/fd")):
        with contextlib.suppress(OSError):
            return sum(1 for _ in folder.iterdir())
    return _OTHER_FILES


@contextlib.contextmanager
def listening_options(**options: Any) -> Iterator[None]:
    """Pass options to `create_server` of the running loop that uvicorn has no setting for."""
    loop = asyncio.get_running_loop()
    create_server: Callable[..., Any] = loop.create_server
    loop.create_server = partial(create_server, **options)  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.create_server = create_server  # type: ignore[method-assign]


def limit_accept_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log one line a minute, without traceback, while no connection can be accepted."""
    warn = RareWarning(
        "a connection cannot be accepted: too many files are open; raise the limit (ulimit -n)"
    )

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "system resource" in str(context.get("message")):
            warn()
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
