"""Messages between two processes: a header of JSON and a body of bytes, each preceded by its length.

Both sides run the same version of this package. No pickle: a worker that was taken over can only send data.
"""

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

Message: TypeAlias = tuple[dict[str, Any], bytes]
_LENGTHS = struct.Struct("<II")
_MAX_BYTES = 1 << 28  # of a header or a body; more means that the peer sends no messages
_READ_BYTES = 1 << 16


class MessageError(Exception):
    """What a peer sent is no message."""


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Return a message as it is sent."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(body)) + text + body


class MessageReader:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete with `data`; raises MessageError."""
        self._data += data
        while len(self._data) >= _LENGTHS.size:
            header_bytes, body_bytes = _LENGTHS.unpack_from(self._data)
            if max(header_bytes, body_bytes) > _MAX_BYTES:
                raise MessageError(f"a message of {header_bytes} and {body_bytes} bytes")
            middle = _LENGTHS.size + header_bytes
            if len(self._data) < middle + body_bytes:
                return
            text = self._data[_LENGTHS.size : middle]
            body = bytes(self._data[middle : middle + body_bytes])
            del self._data[: middle + body_bytes]
            try:
                header = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise MessageError("the header of a message is not JSON") from error
            if not isinstance(header, dict):
                raise MessageError("the header of a message is no JSON object")
            yield header, body


class Channel:
    """One end of a socket whose messages are sent and received one at a time, waiting for each."""

    def __init__(self, connection: socket.socket) -> None:
        """Use a connected socket; it is this object's from now on."""
        self.socket = connection
        self._reader = MessageReader()
        self._received: list[Message] = []

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a message; raises OSError where the peer is gone."""
        self.socket.sendall(pack(header, body))

    def receive(self) -> Message | None:
        """Return the next message; None at the end of the stream. Raises OSError, MessageError."""
        while not self._received:
            data = self.socket.recv(_READ_BYTES)
            if not data:
                return None
            self._received += self._reader.feed(data)
        return self._received.pop(0)

    def receive_ready(self) -> list[Message] | None:
        """Return the messages that have arrived, without waiting; None at the end of the stream."""
        self.socket.setblocking(False)
        try:
            while data := self.socket.recv(_READ_BYTES):
                self._received += self._reader.feed(data)
            return None
        except BlockingIOError:
            pass
        finally:
            self.socket.setblocking(True)
        messages, self._received = self._received, []
        return messages

    def receive_all(self) -> list[Message] | None:
        """Wait for a message, and return it with those that have arrived behind it; None at the end of the stream."""
        first = self.receive()
        rest = None if first is None else self.receive_ready()
        return None if first is None or rest is None else [first, *rest]
