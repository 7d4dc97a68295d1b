"""Connections whose other side does nothing, or nothing but cause work, end after a while; what is not HTTP is answered in the one form.

uvicorn closes a connection once the client has taken the last byte, however long that takes, and waits for a request without limit once its
first byte is there. A client that never reads could so keep a whole answer in memory, and any client a connection, for as long as it likes.
The watch looks at each connection now and then. It asks two things: has the client taken anything of what waits for it, and where it is the
client's turn to send a request, has it taken too long? The time that a body may take is checked where bodies are read, in `limits`, since
there it can be answered; the rest of a body that was answered early is waited for as a head is, and bounded in bytes.

What a client sends is taken in turns: after MAX_EVENTS pieces of a body the other connections come first. While a request is answered the
connection is still read, since that is how its end is noticed. A client that has closed its half of the connection before the answer begins
may wait for it (`nc -N`) or be gone, which look alike until something is sent: it gets a 102, and a client that is gone resets the connection.
"""

import asyncio
import logging
import math
import socket
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanovllm.server.http.errors import error_response

logger = logging.getLogger(__name__)

MAX_EVENTS = 128
"""Pieces of a body that are taken before the other connections' turn: about 3 ms."""
MAX_REST_BYTES = 16 << 20
"""What may still come of a body that was answered early, or after a request that is being answered."""
MAX_PIPELINED_BYTES = 1 << 16
"""What is kept of requests that come before the last one is answered."""
MIN_CHUNKS, MIN_MEAN_CHUNK_BYTES = 1024, 64
"""A chunked body of at least so many chunks must have at least so many bytes in each on average."""

_LOOKS = 4  # in the time that a client has: it is cut off at most a quarter of that later
_RESET_AFTER_S = (0.01, 0.05, 0.25, 0.25, 0.5, 0.5, 1.0, 2.0, 5.0)  # the last again and again
_LOG_EVERY_S = 60.0
_MALFORMED = "the request is not valid HTTP/1.1: its head or the framing of its body cannot be read"
_REFUSED_AT_ONCE = 16
"""Connections beyond the limit that may wait for their request, to be refused in answer to it."""
_REFUSED_S = 0.5


class RareWarning:
    """A message that is logged once a minute at most, however often there is reason."""

    def __init__(self, message: str) -> None:
        """Nothing is logged yet."""
        self._message = message
        self._next_s = -math.inf

    def __call__(self) -> None:
        """Log the message, unless that was done lately."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LOG_EVERY_S
            logger.warning(self._message)


class _MeteredTransport:
    """A transport that counts what is written to it, and reads only where neither of two parties has paused it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = 0
        self._is_paused = False
        self._is_held = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Pass on."""
        self._written += len(data)
        self._transport.write(data)

    @property
    def taken(self) -> int:
        """Bytes that have left this process."""
        return self._written - self._transport.get_write_buffer_size()

    def pause_reading(self) -> None:
        """What uvicorn calls where a body is not fetched by the application."""
        self._is_paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """What uvicorn calls once it is."""
        self._is_paused = False
        if not self._is_held:
            self._transport.resume_reading()

    def hold_reading(self) -> None:
        """Read nothing until `let_read`."""
        self._is_held = True
        self._transport.pause_reading()

    def let_read(self) -> None:
        """Read on, unless uvicorn has paused."""
        self._is_held = False
        if not self._is_paused:
            self._transport.resume_reading()


class WatchedProtocol(H11Protocol):
    """uvicorn's HTTP, watched.

    Attributes:
        stalled_client_s: what a client has to send a request's head, and to take some of its answer.
        max_connections: for one more, the one that has been idle longest is closed; None for any number.
    """

    stalled_client_s: float
    max_connections: int | None = None
    log_full: Callable[[], None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch."""
        self._events_left: int = MAX_EVENTS
        self._meter = _MeteredTransport(transport)
        self._taken = 0
        self._taken_at_s = self.idle_since_s = self.loop.time()
        self._reset_limits()
        self._is_deferred = self._is_half_closed = self._is_refused = False
        self._probe: asyncio.TimerHandle | None = None
        self._parse_event = self.conn.next_event
        self.conn.next_event = self._next_event  # type: ignore[method-assign]
        super().connection_made(cast("asyncio.Transport", self._meter))
        self._next_look = self.loop.call_later(self.stalled_client_s / _LOOKS, self._look)
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._next_look.cancel()
        if self._probe is not None:
            self._probe.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come, in turns with other connections."""
        if self.transport.is_closing():
            return
        if self._is_refused:
            self._refuse_connection()
            return
        if self._is_deferred:
            self.conn.receive_data(data)
            return
        is_answered = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state in (h11.DONE, h11.MUST_CLOSE):
            self._surplus_bytes += len(data)
            if self._surplus_bytes > MAX_REST_BYTES:
                self.transport.abort()
                return
            if self._surplus_bytes > MAX_PIPELINED_BYTES or self.conn.their_state is h11.MUST_CLOSE:
                self.cycle.keep_alive = False  # what is dropped here was not read
                return
        elif is_answered and self.conn.their_state is h11.SEND_BODY:
            self._surplus_bytes += len(data)
            if self._surplus_bytes > MAX_REST_BYTES:
                self.transport.close()
                return
        self._events_left = MAX_EVENTS
        super().data_received(data)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Whether to keep the connection, whose client sends nothing more: where it may still wait for an answer."""
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        if (
            self.scheme != "http"  # TLS cannot be half closed
            or not is_whole
            or self.conn.our_state is not h11.SEND_RESPONSE
            or self.scope["http_version"] != "1.1"
        ):
            return None
        self._is_half_closed = True
        self._send_probe()
        self._look_for_reset(0)
        return True

    def _send_probe(self) -> None:
        """Send what needs no answer, where one can still be told from the request's own."""
        if self.conn.our_state is h11.SEND_RESPONSE:
            probe = h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing")
            self.transport.write(self.conn.send(probe) or b"")

    def _look_for_reset(self, looks: int) -> None:
        """End the connection once its client has answered a probe by a reset; probe and look again later."""
        if looks and self.transport.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_ERROR
        ):
            self.transport.abort()
            return
        if looks > 2:
            self._send_probe()
        delay_s = _RESET_AFTER_S[min(looks, len(_RESET_AFTER_S) - 1)]
        self._probe = self.loop.call_later(delay_s, self._look_for_reset, looks + 1)

    def _next_event(self) -> Any:
        """What uvicorn reads requests by: h11's next event, after MAX_EVENTS of them only when it is this connection's turn again."""
        if self._events_left == 0:
            self._defer()
            return h11.NEED_DATA
        event = self._parse_event()
        if event is h11.PAUSED:  # by which uvicorn would stop reading, and never see the end
            return h11.NEED_DATA
        if isinstance(event, h11.Request):
            self._reset_limits()
            names = [name for name, _ in event.headers]
            self._is_chunked = b"transfer-encoding" in names
            if self._is_chunked and b"content-length" in names:
                raise h11.RemoteProtocolError("two framings of one body")
        elif isinstance(event, h11.Data) and self._is_chunked:
            self._events_left -= 1
            self._chunks += 1
            self._chunk_bytes += len(event.data)
            if (
                self._chunks > MIN_CHUNKS
                and self._chunk_bytes < MIN_MEAN_CHUNK_BYTES * self._chunks
            ):
                raise h11.RemoteProtocolError("a body in chunks of a few bytes")
        return event

    def _reset_limits(self) -> None:
        """What is counted for each request."""
        self._events_left = MAX_EVENTS
        self._chunks: int = 0
        self._chunk_bytes: int = 0
        self._surplus_bytes: int = 0
        self._is_chunked = False

    def _defer(self) -> None:
        """Go on after the other connections' turn."""
        if not self._is_deferred:
            self._is_deferred = True
            self._meter.hold_reading()
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._is_deferred = False
        if self.transport.is_closing():
            return
        self._events_left = MAX_EVENTS
        self.handle_events()
        if not self._is_deferred:
            self._meter.let_read()

    @property
    def is_idle(self) -> bool:
        """Whether it is the client's turn to send a request."""
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> None:
        """Close the connection that has been idle longest, or this one where none is."""
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
        elif len(self.connections) <= (self.max_connections or 0) + _REFUSED_AT_ONCE:
            # Closing before the request has been read would reset the connection, and the answer be lost.
            self._is_refused = True
            self.loop.call_later(_REFUSED_S, self._refuse_connection)
        else:
            self._refuse_connection()

    def _refuse_connection(self) -> None:
        if not self.transport.is_closing():
            self._refuse(503, "the server has as many connections as it can; try again")

    def on_response_complete(self) -> None:
        """From here on it is the client's turn."""
        self.idle_since_s = self.loop.time()
        self._surplus_bytes = 0
        super().on_response_complete()
        if self._is_half_closed and self.is_idle:
            self.transport.close()

    def _look(self) -> None:
        now_s, taken = self.loop.time(), self._meter.taken
        if taken > self._taken or self.transport.get_write_buffer_size() == 0:
            self._taken, self._taken_at_s = taken, now_s
        if now_s - self._taken_at_s >= self.stalled_client_s:
            logger.warning(
                "a client has read nothing of its answer for %g s; its connection is cut",
                self.stalled_client_s,
            )
            self.transport.abort()
            return
        if self.is_idle and now_s - self.idle_since_s >= self.stalled_client_s:
            self._give_up()
        self._next_look = self.loop.call_later(self.stalled_client_s / _LOOKS, self._look)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, and close; a request that is being answered ends without another word."""
        self._refuse(400, _MALFORMED)

    def _give_up(self) -> None:
        """End a connection whose client has had its turn: with an answer where a part of a head is there, otherwise without."""
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(
                408,
                f"the head of the request did not arrive within {self.stalled_client_s:g} s; send it faster",
            )
        else:
            self.transport.close()  # politely: some of the last answer may still be on its way

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            answer = error_response(
                status, message, headers={"connection": "close", "x-request-id": uuid.uuid4().hex}
            )
            for event in (
                h11.Response(
                    status_code=status, headers=answer.raw_headers, reason=HTTPStatus(status).phrase
                ),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if (
            self.cycle is not None and not self.cycle.response_complete
        ):  # its task waits for a body that will not come, or still answers
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def watched_protocol(
    stalled_client_s: float, max_connections: int | None = None
) -> type[WatchedProtocol]:
    """What `uvicorn.Config` takes as `http`: its protocol, for clients that have so long."""
    return type(
        "WatchedProtocol",
        (WatchedProtocol,),
        {
            "stalled_client_s": stalled_client_s,
            "max_connections": max_connections,
            "log_full": RareWarning(
                f"{max_connections} connections are open, the limit; for each new one, the one that has been idle longest is closed"
            ),
        },
    )
