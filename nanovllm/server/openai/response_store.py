"""The responses of /v1/responses that a server keeps, so that later requests may refer to them.

A request continues a response by `previous_response_id`, or has its message as an `item_reference`.
Responses are kept in memory, up to a number of bytes and entries, and never found by another API
key. Where there is no more room, the response that was used longest ago is dropped, of the client
whose responses take the most memory.
"""

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi import FastAPI, Request
from starlette.responses import Response

from nanovllm.server.http.clients import client_of
from nanovllm.server.http.errors import error_response, shorten
from nanovllm.server.http.json_io import dump_json
from nanovllm.server.openai.response_types import DeletedResponse, ModelResponse
from nanovllm.server.openapi import operation

MAX_RESPONSES = 4096
MAX_STORED_BYTES = 32 << 20
MAX_RESPONSE_BYTES = 1 << 20
"""Of a response with its conversation. Whoever refers to one makes the server read it all, and a
conversation grows with each turn, beyond what a request's body may have."""
RESPONSE_PREFIX, MESSAGE_PREFIX = "resp_", "msg_"
_ENTRY_BYTES = 512
"""Memory of an entry without its texts, about."""

Message = Mapping[str, str]
"""A message with `role`, `content` and possibly `name`."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and its conversation, each as JSON.

    Attributes:
        body: what the client received.
        conversation: list of its input's messages, without `instructions`, and of its own message.
    """

    body: bytes
    conversation: bytes

    @property
    def num_bytes(self) -> int:
        """Return the memory that it takes, about."""
        return len(self.body) + len(self.conversation) + _ENTRY_BYTES

    @property
    def messages(self) -> list[Message]:
        """Return the conversation."""
        messages: list[Message] = json.loads(self.conversation)
        return messages


class ResponseStore:
    """Keeps the responses of all clients. Threads may share it."""

    def __init__(
        self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORED_BYTES
    ) -> None:
        """Keep at most this many responses, of this many bytes together."""
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        # By client and id, the one used longest ago first.
        self._responses: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._held_bytes: Counter[str] = Counter()  # by client
        self._lock = threading.Lock()

    def add(self, client: str, response_id: str, response: StoredResponse) -> bool:
        """Keep a response of a client, and return whether it is small enough to be kept."""
        if response.num_bytes > min(self._max_bytes, MAX_RESPONSE_BYTES):
            return False
        with self._lock:
            self._responses[client, response_id] = response
            self._held_bytes[client] += response.num_bytes
            while (
                len(self._responses) > self._max_responses
                or self._held_bytes.total() > self._max_bytes
            ):
                ((largest, _),) = self._held_bytes.most_common(1)
                self._remove(next(key for key in self._responses if key[0] == largest))
        return True

    def find(self, client: str, response_id: str) -> StoredResponse | None:
        """Return a response of a client; None if it is not kept."""
        with self._lock:
            found = self._responses.get((client, response_id))
            if found is not None:
                self._responses.move_to_end((client, response_id))
            return found

    def remove(self, client: str, response_id: str) -> bool:
        """Remove a response of a client; return whether it was kept."""
        with self._lock:
            return self._remove((client, response_id))

    def _remove(self, key: tuple[str, str]) -> bool:
        removed = self._responses.pop(key, None)
        if removed is None:
            return False
        self._held_bytes[key[0]] -= removed.num_bytes
        self._held_bytes = +self._held_bytes  # without the client whose last response it was
        return True


@dataclass(frozen=True, slots=True)
class ClientResponses:
    """The responses of one client in a store; without a store, none are kept."""

    store: ResponseStore | None = None
    client: str = ""

    @property
    def is_kept(self) -> bool:
        """Whether responses are kept."""
        return self.store is not None

    def add(self, body: ModelResponse, messages: Sequence[Message]) -> bool:
        """Keep a complete response, and return whether it is kept.

        `messages` are the conversation with the response's own.
        """
        if self.store is None or _characters(messages) > MAX_RESPONSE_BYTES:
            return False
        stored = StoredResponse(dump_json(body), dump_json(messages))
        return self.store.add(self.client, body["id"], stored)

    def conversation(self, response_id: str) -> list[Message] | None:
        """Return the messages of a response's conversation; None if it is not kept."""
        found = None if self.store is None else self.store.find(self.client, response_id)
        return None if found is None else found.messages

    def message(self, item_id: str) -> Message | None:
        """Return the message of a response by the message's id; None if it is not kept."""
        if not item_id.startswith(MESSAGE_PREFIX):
            return None
        found = self.conversation(RESPONSE_PREFIX + item_id.removeprefix(MESSAGE_PREFIX))
        return None if found is None else found[-1]


NOT_KEPT = ClientResponses()


def add_store_routes(app: FastAPI, store: ResponseStore) -> None:
    """Add GET and DELETE of /v1/responses/{id}."""

    @app.get("/v1/responses/{response_id}", **operation(404, response=ModelResponse))
    async def stored_response(request: Request, response_id: str) -> Response:
        """A response that the server keeps."""
        found = store.find(client_of(request).key_digest, response_id)
        if found is None:
            return _not_found(response_id)
        return Response(found.body, media_type="application/json")

    @app.delete("/v1/responses/{response_id}", **operation(404, response=DeletedResponse))
    async def delete_response(request: Request, response_id: str) -> Response:
        """Delete a response that the server keeps."""
        if not store.remove(client_of(request).key_digest, response_id):
            return _not_found(response_id)
        deleted = DeletedResponse(id=response_id, object="response", deleted=True)
        return Response(dump_json(deleted), media_type="application/json")


def _not_found(response_id: str) -> Response:
    message = f"there is no response {shorten(response_id, 80)!r}: it was never stored, or dropped"
    return error_response(404, message, "response_id")


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(text) for message in messages for text in message.values())
