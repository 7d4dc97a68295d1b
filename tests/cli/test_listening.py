"""The connection limits of a server, and its log without free open files."""

import asyncio
import logging
import re
import socket
import sys

import pytest

from nanovllm.cli.listening import (
    BACKLOG,
    bind,
    connection_limits,
    limit_accept_errors,
    listening_options,
    raise_open_files_limit,
)


def test_sockets_are_bound_before_the_model_is_loaded() -> None:
    (bound,) = bind("127.0.0.1", 0)
    with bound:
        port = bound.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1 port {port}: address already in use; stop"):
            bind("127.0.0.1", port)
    with pytest.raises(OSError, match=re.escape("choose an address of this machine by --host")):
        bind("192.0.2.1", 0)
    for one in bind("localhost", 0):
        assert one.family in (socket.AF_INET, socket.AF_INET6)
        one.close()


def test_responses_are_not_delayed_by_nagles_algorithm() -> None:
    async def connect() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected = writer.get_extra_info("socket")
            accepted.set_result(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        (bound,) = bind("127.0.0.1", 0)
        port = bound.getsockname()[1]
        async with await asyncio.start_server(note, sock=bound):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return await accepted

    assert asyncio.run(connect())


def test_connections_leave_room_for_the_files_that_a_server_needs() -> None:
    assert connection_limits(None) == (None, BACKLOG)
    for max_files in (64, 256, 1024, 65536):
        connections, backlog = connection_limits(max_files)
        assert connections is not None
        assert 1 <= connections < max_files - backlog - 16
        assert backlog <= BACKLOG
    assert connection_limits(8)[0] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_the_soft_limit_is_raised_to_the_hard_limit() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, before[1]), before[1]))
        raised = raise_open_files_limit()
        assert raised == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert raised >= min(200, before[1])
        assert sys.platform != "linux" or raised == min(before[1], 65536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_accept_errors_are_logged_once_and_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        limit_accept_errors(loop)
        for _ in range(1000):
            loop.call_exception_handler({
                "message": "socket.accept() out of system resource",
                "exception": OSError(24, "Too many open files"),
            })  # fmt: skip
        loop.call_exception_handler({"message": "another"})

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert [
        record.getMessage() for record in caplog.records if "accept" in record.getMessage()
    ] == ["a connection cannot be accepted: too many files are open; raise the limit (ulimit -n)"]
    assert any("another" in record.getMessage() for record in caplog.records)


def test_servers_are_created_with_the_options() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        with listening_options(start_serving=False):
            server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        assert not server.is_serving()
        server.close()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        assert server.is_serving()
        server.close()

    asyncio.run(run())
