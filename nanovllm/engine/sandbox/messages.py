"""Messages between two processes: a JSON header and a body of bytes, each preceded by its length.

Both processes run the same version of this package. Pickle is not used, so that a compromised
worker can send nothing but data.
"""

import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

Message: TypeAlias = tuple[dict[str, Any], bytes]
_LENGTHS = struct.Struct("<II")
NOTE_BYTES = 8
PATH_NOTE = 1 << 62
"""Added to the noted number of a sequence whose path is computed; see grammar_worker.py."""
_MAX_BYTES = 1 << 28  # of a header or a body; the peer is broken if it sends more
_READ_BYTES = 1 << 16
_MAX_READS = 64


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
    """One end of a socket, and a file in which a child notes what it is doing."""

    def __init__(self, connection: socket.socket, note: int = -1) -> None:
        """Take ownership of a connected socket; `note` is the descriptor of the file, or -1."""
        self._socket = connection
        self._note = note
        self._reader = MessageReader()
        self._received: list[Message] = []

    def note(self, number: int) -> None:
        """Write a number that the parent can read after this process was killed."""
        if self._note >= 0:
            os.pwrite(self._note, number.to_bytes(NOTE_BYTES, "little"), 0)

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a message. Raises OSError where the peer has ended."""
        self._socket.sendall(pack(header, body))

    def receive(self) -> Message | None:
        """Return the next message; None at end of stream. Raises OSError, MessageError."""
        while not self._received:
            data = self._socket.recv(_READ_BYTES)
            if not data:
                return None
            self._received += self._reader.feed(data)
        return self._received.pop(0)

    def receive_ready(self) -> list[Message] | None:
        """Return the messages that have arrived, without waiting; None at end of stream."""
        is_open = True
        self._socket.setblocking(False)
        try:
            for _ in range(_MAX_READS):  # the peer may send without end
                data = self._socket.recv(_READ_BYTES)
                self._received += self._reader.feed(data)
                if not data:
                    is_open = False
                    break
        except BlockingIOError:
            pass
        except ConnectionError:
            is_open = False
        finally:
            self._socket.setblocking(True)
        messages, self._received = self._received, []
        return messages if messages or is_open else None

    def receive_all(self) -> list[Message] | None:
        """Wait for a message, and return it with all that have arrived; None at end of stream."""
        first = self.receive()
        return None if first is None else [first, *(self.receive_ready() or ())]
