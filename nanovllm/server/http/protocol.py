"""uvicorn's HTTP protocol with timeouts for stalled clients, limits on input, and JSON errors.

uvicorn waits without limit for a client to read its response, and for a request after its first
byte. A client that never reads would hold a whole response in memory, and any client a connection.
Each connection is therefore checked a few times per timeout: has the client read any pending bytes,
and if a request is due, has it arrived in time? The time limit on a body is in body_limit.py, where
it can be answered; the rest of a body that was refused early has the limits of a request's head.

A connection is read while its request runs, because only reading detects a disconnect. A client
that half-closes its connection before the response may be waiting (`nc -N`) or gone; both look
alike until something is sent. It gets a 102 now and then: one that is gone answers with a reset,
after which sending fails.
"""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanovllm.server.http.errors import error_response

logger = logging.getLogger(__name__)

MAX_REST_BYTES = 16 << 20
"""Maximum bytes after a response has begun: the rest of a refused body, or further requests."""
MAX_PIPELINED_BYTES = 1 << 16
"""Maximum bytes of pipelined requests."""
MIN_CHUNKS, MIN_MEAN_CHUNK_BYTES = 1024, 128
"""A body of more than MIN_CHUNKS chunks must have this mean size of chunks: each chunk takes as
long as one of 64 KiB, and those that are read at once delay other connections."""

_CHECKS_PER_TIMEOUT = 4
_FIRST_PROBE_S, _MAX_PROBE_S = 0.01, 0.5
_LOG_EVERY_S = 60.0
_MALFORMED = "the request is not valid HTTP/1.1: its head or the framing of its body cannot be read"
_MAX_REFUSED = 16
"""Connections over the limit that are kept for their request, to answer it with 503."""
_REFUSED_S = 0.5


class RareWarning:
    """A warning that is logged at most once a minute."""

    def __init__(self, message: str) -> None:
        self._message = message
        self._next_s = -math.inf

    def __call__(self) -> None:
        """Log the message, unless it was logged within the last minute."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LOG_EVERY_S
            logger.warning(self._message)


class _MeteredTransport:
    """A transport that counts sent bytes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write and count."""
        self._written += len(data)
        self._transport.write(data)

    @property
    def sent_bytes(self) -> int:
        """Return the bytes that have left this process."""
        return self._written - self._transport.get_write_buffer_size()


class _StrictConnection(h11.Connection):
    """h11's parser, which refuses tiny chunks, and bodies with two framings."""

    _is_chunked = False
    _num_chunks = _num_chunk_bytes = 0

    def next_event(self) -> Any:
        """Return the next event; raises RemoteProtocolError for a request that is refused."""
        event = super().next_event()
        if event is h11.PAUSED:  # on it uvicorn stops reading and misses disconnects
            return h11.NEED_DATA
        if isinstance(event, h11.Request):
            names = [name for name, _ in event.headers]
            self._is_chunked = b"transfer-encoding" in names
            self._num_chunks = self._num_chunk_bytes = 0
            if self._is_chunked and b"content-length" in names:
                raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
        elif isinstance(event, h11.Data) and self._is_chunked:
            self._num_chunks += 1
            self._num_chunk_bytes += len(event.data)
            least_bytes = MIN_MEAN_CHUNK_BYTES * self._num_chunks
            if self._num_chunks > MIN_CHUNKS and self._num_chunk_bytes < least_bytes:
                raise h11.RemoteProtocolError("a body of tiny chunks")
        return event


class WatchedProtocol(H11Protocol):
    """uvicorn's h11 protocol with stall detection.

    Attributes:
        stalled_client_s: timeout for sending a request's head, and for reading any response bytes.
        max_connections: limit at which the connection that has been idle longest is closed, or
            None.
        log_full: logs that the limit is reached.
    """

    stalled_client_s: float
    max_connections: int | None = None
    log_full: Callable[[], None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the stall checks."""
        max_head_bytes = self.conn._max_incomplete_event_size  # noqa: SLF001
        self.conn = _StrictConnection(h11.SERVER, max_head_bytes)
        self._meter = _MeteredTransport(transport)
        self._sent_bytes = self._surplus_bytes = 0
        self._progress_s = self.idle_since_s = self.loop.time()
        self._is_half_closed = self._is_refused = False
        super().connection_made(cast("asyncio.Transport", self._meter))
        self._next_check = self.loop.call_later(
            self.stalled_client_s / _CHECKS_PER_TIMEOUT, self._check_stall
        )
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            self._enforce_max_connections()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the checks."""
        self._next_check.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse input; drop what comes after a complete request that closes the connection."""
        if self.transport.is_closing():
            return
        if self._is_refused:
            self._refuse_connection()
            return
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        if is_whole or (self.is_idle and self.conn.their_state is h11.SEND_BODY):
            self._surplus_bytes += len(data)
            if self._surplus_bytes > MAX_REST_BYTES:
                self.transport.close()
                return
        if is_whole and (
            self._surplus_bytes > MAX_PIPELINED_BYTES or self.conn.their_state is h11.MUST_CLOSE
        ):
            self.cycle.keep_alive = False
            return
        super().data_received(data)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Return whether a half-closed connection stays open, because its client may be waiting."""
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        if (
            self.scheme != "http"  # TLS cannot be half closed
            or not is_whole
            or self.conn.our_state is not h11.SEND_RESPONSE
            or self.scope["http_version"] != "1.1"
        ):
            return None
        self._is_half_closed = True
        self._probe(_FIRST_PROBE_S)
        return True

    def _probe(self, delay_s: float) -> None:
        """Send a 102, and others after increasing delays until the response begins."""
        if self.conn.our_state is h11.SEND_RESPONSE and not self.transport.is_closing():
            probe = h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing")
            self.transport.write(self.conn.send(probe) or b"")
            self.loop.call_later(delay_s, self._probe, min(2 * delay_s, _MAX_PROBE_S))

    @property
    def is_idle(self) -> bool:
        """Return whether the connection waits for a request."""
        return self.cycle is None or self.cycle.response_complete

    def _enforce_max_connections(self) -> None:
        """Close the connection that has been idle longest, or else refuse this one."""
        others = [
            connection
            for connection in self.connections
            if isinstance(connection, WatchedProtocol)
            and connection is not self
            and connection.is_idle
            and not connection.transport.is_closing()
        ]
        self.log_full()
        if others:
            min(others, key=lambda connection: connection.idle_since_s).transport.abort()
        elif len(self.connections) <= (self.max_connections or 0) + _MAX_REFUSED:
            # Closing before the request is read would reset the connection and lose the 503.
            self._is_refused = True
            self.loop.call_later(_REFUSED_S, self._refuse_connection)
        else:
            self._refuse_connection()

    def _refuse_connection(self) -> None:
        if not self.transport.is_closing():
            self._refuse(503, "the server has as many connections as it can; try again")

    def on_response_complete(self) -> None:
        """Start the timeout for the next request."""
        self.idle_since_s = self.loop.time()
        self._surplus_bytes = 0
        super().on_response_complete()
        if self._is_half_closed and self.is_idle:
            self.transport.close()

    def _check_stall(self) -> None:
        """Abort the connection if its client has stalled, else check again later."""
        now_s, sent_bytes = self.loop.time(), self._meter.sent_bytes
        if sent_bytes > self._sent_bytes or self.transport.get_write_buffer_size() == 0:
            self._sent_bytes, self._progress_s = sent_bytes, now_s
        if now_s - self._progress_s >= self.stalled_client_s:
            logger.warning(
                "a client has read nothing of its response for %g s; its connection is closed",
                self.stalled_client_s,
            )
            self.transport.abort()
            return
        if self.is_idle and now_s - self.idle_since_s >= self.stalled_client_s:
            self._time_out()
        self._next_check = self.loop.call_later(
            self.stalled_client_s / _CHECKS_PER_TIMEOUT, self._check_stall
        )

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP in the API's error format, and close."""
        self._refuse(400, _MALFORMED)

    def _time_out(self) -> None:
        """Close a connection that waits for a request; answer 408 to a partial head."""
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(
                408,
                f"the head of the request did not arrive within {self.stalled_client_s:g} s; "
                "send it faster",
            )
        else:
            self.transport.close()  # no abort: the last response may still be in transit

    def _refuse(self, status: int, message: str) -> None:
        """Send an error unless a response has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            response = error_response(
                status, message, headers={"connection": "close", "x-request-id": uuid.uuid4().hex}
            )
            for event in (
                h11.Response(
                    status_code=status,
                    headers=response.raw_headers,
                    reason=HTTPStatus(status).phrase,
                ),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # wake its task
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def watched_protocol(
    stalled_client_s: float, max_connections: int | None = None
) -> type[WatchedProtocol]:
    """Return a protocol class with these settings, for `uvicorn.Config(http=...)`."""
    return type(
        "WatchedProtocol",
        (WatchedProtocol,),
        {
            "stalled_client_s": stalled_client_s,
            "max_connections": max_connections,
            "log_full": RareWarning(
                f"{max_connections} connections are open, the limit; each new one closes the one "
                "that has been idle longest"
            ),
        },
    )
