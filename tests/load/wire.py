"""HTTP over sockets for load generators, which must send and read incorrectly on purpose.

Client libraries cannot disconnect midway, stop reading or send malformed data.
"""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

HOST = "127.0.0.1"
HOST_HEADER = "localhost"
_READ_BYTES = 1 << 16
_SMALL_BUFFER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Answer:
    """A response; `is_whole` if it is complete."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    is_whole: bool


def post(path: str, body: object, **headers: str) -> bytes:
    """Return a POST with a JSON body; bytes are sent unchanged."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {
        "host": HOST_HEADER,
        "content-type": "application/json",
        "content-length": str(len(content)),
        "connection": "close",
        **headers,
    }
    return head(f"POST {path} HTTP/1.1", named) + content


def get(path: str) -> bytes:
    """Return a GET with `Connection: close`."""
    return head(f"GET {path} HTTP/1.1", {"host": HOST_HEADER, "connection": "close"})


def head(first_line: str, headers: Mapping[str, str]) -> bytes:
    """Return the head of a request."""
    return "\r\n".join(
        [first_line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    ).encode()


class Connection:
    """A connection to a local port, as an async context manager."""

    def __init__(self, port: int, *, small_buffer: bool = False) -> None:
        """Connect on entering; `small_buffer` shrinks the receive buffer."""
        self._port = port
        self._socket = socket.socket()
        self._socket.setblocking(False)
        if small_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER_BYTES)

    async def __aenter__(self) -> "Connection":
        try:
            await asyncio.get_running_loop().sock_connect(self._socket, (HOST, self._port))
        except BaseException:
            self._socket.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        """Send all data."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def read(self, most: int = _READ_BYTES) -> bytes:
        """Return available data; empty at the end of the connection."""
        return await asyncio.get_running_loop().sock_recv(self._socket, most)

    async def read_all(self) -> bytes:
        """Read to the end of the connection or a reset."""
        parts = []
        try:
            while part := await self.read():
                parts.append(part)
        except ConnectionError:
            pass
        return b"".join(parts)

    def reset_on_close(self) -> None:
        """Close by a reset (RST)."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def end_sending(self) -> None:
        """Half-close the connection."""
        self._socket.shutdown(socket.SHUT_WR)


async def read_for(connection: Connection, timeout_s: float) -> bytes:
    """Read to the end of the connection or the timeout."""
    received = b""
    end_s = time.monotonic() + timeout_s
    try:
        while part := await asyncio.wait_for(connection.read(), max(0.0, end_s - time.monotonic())):
            received += part
    except (ConnectionError, asyncio.TimeoutError):
        pass
    return received


def parse(received: bytes) -> Answer | None:
    """Parse the response of a closed connection; None without a complete head.

    Interim responses (1xx) are skipped.
    """
    top, end, rest = received.partition(b"\r\n\r\n")
    while end and top.startswith(b"HTTP/1.1 1"):
        top, end, rest = rest.partition(b"\r\n\r\n")
    first_line, *lines = top.decode("latin-1").split("\r\n")
    words = first_line.split(" ", 2)
    if not end or len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        return None
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines)
    }
    if headers.get("transfer-encoding") == "chunked":
        body, is_whole = _join_chunks(rest)
    else:
        body = rest
        is_whole = "content-length" not in headers or len(body) == int(headers["content-length"])
    return Answer(int(words[1]), headers, body, is_whole)


def _join_chunks(data: bytes) -> tuple[bytes, bool]:
    parts, offset = [], 0
    while (end := data.find(b"\r\n", offset)) >= 0:
        size = int(data[offset:end], 16)
        part = data[end + 2 : end + 2 + size]
        parts.append(part)
        offset = end + 4 + size
        if len(part) < size or size == 0:
            return b"".join(parts), size == 0
    return b"".join(parts), False
