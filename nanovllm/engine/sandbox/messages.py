"""Messages between two processes: a JSON header and a body of bytes, each preceded by its length.

Both processes run the same version of this package. Pickle is not used, so that a compromised
worker can send nothing but data.
"""

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

Message: TypeAlias = tuple[dict[str, Any], bytes]
_LENGTHS = struct.Struct("<II")
_MAX_BYTES = 1 << 28  # of a header or a body; the peer is broken if it sends more
_READ_BYTES = 1 << 16


class MessageError(Exception):
    """The peer sent bytes that are not a message."""


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Return the bytes of a message."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(body)) + text + body


class MessageReader:
    """Splits a stream of bytes into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Add bytes, and yield the messages that are complete. Raises MessageError."""
        self._data += data
        while len(self._data) >= _LENGTHS.size:
            header_bytes, body_bytes = _LENGTHS.unpack_from(self._data)
            if max(header_bytes, body_bytes) > _MAX_BYTES:
                raise MessageError(f"a message of {header_bytes} and {body_bytes} bytes")
            body_start = _LENGTHS.size + header_bytes
            end = body_start + body_bytes
            if len(self._data) < end:
                return
            text = self._data[_LENGTHS.size : body_start]
            body = bytes(self._data[body_start:end])
            del self._data[:end]
            try:
                header = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise MessageError("the header of a message is not JSON") from error
            if not isinstance(header, dict):
                raise MessageError("the header of a message is not a JSON object")
            yield header, body


class Channel:
    """One end of a socket, for blocking transfer of one message at a time."""

    def __init__(self, connection: socket.socket) -> None:
        """Take ownership of a connected socket."""
        self.socket = connection
        self._reader = MessageReader()
        self._received: list[Message] = []

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a message. Raises OSError where the peer has ended."""
        self.socket.sendall(pack(header, body))

    def receive(self) -> Message | None:
        """Return the next message; None at end of stream. Raises OSError, MessageError."""
        while not self._received:
            data = self.socket.recv(_READ_BYTES)
            if not data:
                return None
            self._received += self._reader.feed(data)
        return self._received.pop(0)

    def receive_ready(self) -> list[Message] | None:
        """Return the messages that have arrived, without waiting; None at end of stream."""
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
        """Wait for a message, and return it with all that have arrived; None at end of stream."""
        first = self.receive()
        rest = None if first is None else self.receive_ready()
        return None if first is None or rest is None else [first, *rest]
