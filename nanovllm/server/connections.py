"""Connections whose other side does nothing end after a while, with all that is kept for them; what is not HTTP is answered in the one form.

uvicorn closes a connection once the client has taken the last byte, however long that takes, and waits for a request without limit once its
first byte is there. A client that never reads could so keep a whole answer in memory, and any client a connection, for as long as it likes.
The watch looks at each connection now and then. It asks two things: has the client taken anything of what waits for it, and where it is the
client's turn to send a request, has it taken too long? The time that a body may take is checked where bodies are read, in `limits`, since
there it can be answered; the rest of a body that was answered early is waited for as a head is.
"""

import asyncio
import logging
import uuid
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanovllm.server.errors import error_response

logger = logging.getLogger(__name__)

_LOOKS = 4  # in the time that a client has: it is cut off at most a quarter of that later


class _MeteredTransport:
    """A transport that counts what is written to it, so that it is known how much the client has taken."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._written = 0

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


class WatchedProtocol(H11Protocol):
    """uvicorn's HTTP, watched. `stalled_client_s` is what a client has to send a request's head, and to take some of its answer."""

    stalled_client_s: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch."""
        self._meter = _MeteredTransport(transport)
        self._taken = 0
        self._taken_at_s = self._idle_since_s = self.loop.time()
        super().connection_made(cast("asyncio.Transport", self._meter))
        self._next_look = self.loop.call_later(self.stalled_client_s / _LOOKS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._next_look.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """From here on it is the client's turn."""
        self._idle_since_s = self.loop.time()
        super().on_response_complete()

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
        is_clients_turn = self.cycle is None or self.cycle.response_complete
        if is_clients_turn and now_s - self._idle_since_s >= self.stalled_client_s:
            self._give_up()
        self._next_look = self.loop.call_later(self.stalled_client_s / _LOOKS, self._look)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, and close; a request that is being answered ends without another word."""
        self._refuse(
            400,
            "the request is not valid HTTP/1.1: its head or the framing of its body cannot be read",
        )

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


def watched_protocol(stalled_client_s: float) -> type[WatchedProtocol]:
    """What `uvicorn.Config` takes as `http`: its protocol, for clients that have so long."""
    return type("WatchedProtocol", (WatchedProtocol,), {"stalled_client_s": stalled_client_s})
