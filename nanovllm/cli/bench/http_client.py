"""HTTP client of the load generator: one request per connection, with arrival times.

It uses h11, a dependency of uvicorn. A client library would queue data between socket and clock.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

_READ_BYTES = 1 << 16
_MAX_REFUSAL_BYTES = 1 << 16
_CONNECT_TIMEOUT_S = 10.0
_QUICK_ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server's URL; `path` is the prefix of /v1."""

    url: str
    host: str
    port: int
    is_tls: bool
    path: str
    api_key: str | None = field(repr=False)

    @classmethod
    def at(cls, url: str, api_key: str | None = None) -> "Server":
        """Parse a URL, with or without /v1 at its end; raises ValueError."""
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or port is None:
            raise ValueError(
                f"{url!r} is not the URL of a server; write it like http://127.0.0.1:8000"
            )
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(
            f"{parts.scheme}://{parts.netloc}{path}",
            parts.hostname,
            port,
            parts.scheme == "https",
            path,
            api_key,
        )

    def request(self, method: str, path: str, body: bytes) -> h11.Request:
        """Return the head of a request with this body."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = [
            ("host", f"{host}:{self.port}"), ("user-agent", "nanovllm-bench"), ("accept", "*/*"),
            ("connection", "close"), ("content-type", "application/json"),
            ("content-length", str(len(body))),
        ]  # fmt: skip
        if self.api_key is not None:
            headers.append(("authorization", f"Bearer {self.api_key}"))
        return h11.Request(method=method, target=self.path + path, headers=headers)


async def pieces(
    server: Server, method: str, path: str, payload: object = None
) -> AsyncGenerator[tuple[float, bytes], None]:
    """Yield the pieces of a response body, each with its arrival time (`time.perf_counter()`).

    Raises ConnectionError if the server cannot be reached, answers with an error, disconnects or
    does not speak HTTP.
    """
    body = b"" if payload is None else json.dumps(payload).encode()
    connection = h11.Connection(h11.CLIENT)
    refused, status, refusal = False, 0, b""
    reader, writer = await _connect(server)
    try:
        for event in (server.request(method, path, body), h11.Data(data=body), h11.EndOfMessage()):
            writer.write(connection.send(event) or b"")
        await writer.drain()
        now = time.perf_counter()
        while True:
            answer = connection.next_event()
            if answer is h11.NEED_DATA:
                received = await reader.read(_READ_BYTES)
                now = time.perf_counter()
                connection.receive_data(received)
            elif isinstance(answer, h11.Response):
                status, refused = answer.status_code, answer.status_code != 200
            elif isinstance(answer, h11.Data) and not refused:
                yield now, bytes(answer.data)
            elif isinstance(answer, h11.Data) and len(refusal) < _MAX_REFUSAL_BYTES:
                refusal += bytes(answer.data)
            elif isinstance(answer, h11.EndOfMessage):
                break
    except h11.ProtocolError as error:
        raise ConnectionError(f"{server.url} broke off, or does not speak HTTP: {error}") from error
    finally:
        writer.close()
    if refused:
        raise ConnectionError(f"{server.url}{path} answered {status}: {_reason(refusal)}")


async def get_text(server: Server, path: str) -> str:
    """Return the text at `path`; raises ConnectionError, also after a timeout."""

    async def whole() -> bytes:
        async with aclosing(pieces(server, "GET", path)) as answer:
            return b"".join([piece async for _, piece in answer])

    try:
        content = await asyncio.wait_for(whole(), _QUICK_ANSWER_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ConnectionError(
            f"{server.url}{path} did not answer within {_QUICK_ANSWER_TIMEOUT_S:g} s"
        ) from None
    return content.decode(errors="replace")


async def get_json(server: Server, path: str) -> Any:
    """Return the JSON at `path`; raises ConnectionError, also after a timeout."""
    try:
        return json.loads(await get_text(server, path))
    except ValueError as error:
        raise ConnectionError(
            f"{server.url}{path} does not answer in JSON, so it is no OpenAI-compatible server: "
            f"{error}"
        ) from error


async def events(
    server: Server, path: str, payload: object
) -> AsyncGenerator[tuple[float, Any], None]:
    """Yield a stream's events up to `[DONE]` with their arrival times; raises ConnectionError."""
    rest = b""
    async with aclosing(pieces(server, "POST", path, payload)) as answer:
        async for now, piece in answer:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                try:
                    yield now, json.loads(data)
                except ValueError as error:
                    raise ConnectionError(
                        f"{server.url}{path} sent an event that is not JSON: {error}"
                    ) from error
    raise ConnectionError(f"{server.url}{path} ended its stream before [DONE]")


def reason_of(error: object) -> str:
    """Return the message of an OpenAI-style error object."""
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:1000]


async def _connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    opening = asyncio.open_connection(server.host, server.port, ssl=True if server.is_tls else None)
    try:
        return await asyncio.wait_for(opening, _CONNECT_TIMEOUT_S)
    except asyncio.TimeoutError:
        reason = f"no answer within {_CONNECT_TIMEOUT_S:g} s"
    except OSError as error:
        reason = str(error)
    raise ConnectionError(
        f"no connection to {server.url} ({reason}); start a server with 'nanovllm serve', "
        "or correct --base-url"
    )


def _reason(refusal: bytes) -> str:
    try:
        body = json.loads(refusal)
    except ValueError:
        return refusal.decode(errors="replace")[:1000]
    return reason_of(body.get("error", body) if isinstance(body, dict) else body)
