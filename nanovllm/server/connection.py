"""A client's connection: uvicorn's HTTP/1.1, which also answers what cannot be read as HTTP in the one form of errors, and waits neither
for ever for the head of a request nor for the end of a body that was refused.
"""

import asyncio
import uuid
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanovllm.server.errors import error_response

PATIENCE_S = 60.0


class Connection(H11Protocol):
    """One connection, for `uvicorn.Config(http=...)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Made by uvicorn for every client."""
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head; between requests uvicorn's keep-alive timeout counts."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(PATIENCE_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Read on; while something is incomplete that nobody else waits for, the time since its beginning counts."""
        super().data_received(data)
        if not self._is_owed():
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(PATIENCE_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, and close; a request that is being answered ends without another word."""
        self._refuse(400, "the request is not valid HTTP/1.1: its head or the framing of its body cannot be read")

    def _is_owed(self) -> bool:
        """Whether a part of a head is here, or of a body to which all has been said."""
        if self.transport.is_closing():
            return False
        if self.conn.their_state is h11.IDLE:
            return bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, f"the head of the request did not arrive within {PATIENCE_S:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            answer = error_response(status, message, headers={"connection": "close", "x-request-id": uuid.uuid4().hex})
            for event in (
                h11.Response(status_code=status, headers=answer.raw_headers, reason=HTTPStatus(status).phrase),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # its task waits for a body that will not come, or still answers
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
