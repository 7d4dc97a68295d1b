"""Request ids, and the request log.

Every response carries `x-request-id`: the client's own if it sent a valid one, so that its log and
the server's can be joined, otherwise a new one. With `log_requests` the logger `nanovllm.requests`
gets a JSON object for each request when its response has ended:

    {"time": "2026-01-31T12:00:00.000+00:00", "request_id": "...", "method": "POST",
     "path": "/v1/completions", "status": 200, "duration_ms": 41.7, "prompt_tokens": 5,
     "completion_tokens": 16, "client_gone": false, "timed_out": false, "answer_id": "cmpl-..."}

Prompts are private, so they are logged only with `log_prompts`. Plain ASGI, so that nothing is
buffered.
"""

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TextIO, TypeAlias

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.deadlines import Deadline
from nanovllm.server.http.clients import identify
from nanovllm.server.http.errors import shorten

MAX_PROMPTS = 10
MAX_PROMPT_CHARACTERS = 2000  # of each; of token ids, half as many
_HEADER = b"x-request-id"
_CLIENT_DISCONNECTED = 499
_VALID_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
Headers: TypeAlias = list[tuple[bytes, bytes]]
_logger = logging.getLogger("nanovllm.requests")


@dataclass(slots=True)
class RequestRecord:
    """State of one request. The middleware records the response, the handler the rest.

    Attributes:
        request_id: the `x-request-id` header of the response.
        arrived_at, arrived_s: when the head arrived, as a date and by `time.monotonic()`.
        status: HTTP status; None until the response starts.
        is_answered: the last byte of the response has been sent.
        client_gone: the client disconnected or stopped reading before that.
        timed_out: the request exceeded its deadline.
        answer_id: `id` in the response's body.
        prompt_tokens: tokens of the valid prompts; None before validation.
        completion_tokens: generated tokens; None if generation did not begin.
        keeps_prompts: prompts are logged.
        prompts: the prompts to log; None if they are not logged, or before validation.
    """

    request_id: str
    arrived_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    arrived_s: float = field(default_factory=time.monotonic)
    status: int | None = None
    is_answered: bool = False
    client_gone: bool = False
    timed_out: bool = False
    answer_id: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    keeps_prompts: bool = False
    prompts: Sequence[str | list[int]] | None = None

    def note_prompts(self, prompts: Sequence[str | list[int]]) -> None:
        """Record the prompts as sent, if prompts are logged."""
        self.prompts = prompts if self.keeps_prompts else None

    def line(self, method: str, path: str) -> str:
        """Return the log line, JSON in ASCII: no input of a client can break or forge a line."""
        fields: dict[str, Any] = {
            "time": self.arrived_at.isoformat(timespec="milliseconds"),
            "request_id": self.request_id, "method": shorten(method), "path": shorten(path),
            "status": self.status,
            "duration_ms": round(1000 * (time.monotonic() - self.arrived_s), 3),
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
            "client_gone": self.client_gone,
            "timed_out": self.timed_out,
            "answer_id": self.answer_id,
        }  # fmt: skip
        if self.prompts is not None:
            fields["prompts"] = [_truncated(prompt) for prompt in self.prompts[:MAX_PROMPTS]]
        return json.dumps(fields)


class RequestLogMiddleware:
    """Give every request an id and log it. It goes outside of the layers that refuse requests."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        log_requests: bool,
        log_prompts: bool = False,
        count: Callable[[Scope, int], None] = lambda scope, status: None,
        headers: Callable[[], Headers] = list,
    ) -> None:
        """Wrap `app`; without `log_requests` requests only get ids.

        Args:
            count: called with the status of each request before the client sees the end of its
                response; with 499 where the client was gone before it began.
            headers: returns headers of a response that begins, beside its id.
        """
        self._app = app
        self._count = count
        self._headers = headers
        self._log_requests = log_requests
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Record the response and disconnects, and log."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identify(scope)
        record = RequestRecord(_request_id(scope["headers"]), keeps_prompts=self._log_prompts)
        state = scope["state"]
        state["record"] = record

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not record.is_answered:
                record.client_gone = True
            return message

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                own = [(_HEADER, record.request_id.encode()), *self._headers()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                # Set before sending: then uvicorn reports every connection as disconnected.
                record.is_answered = True
                self._count(scope, record.status or _CLIENT_DISCONNECTED)
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
            # A stream ends early only for a client that has gone.
            record.client_gone = record.client_gone or not record.is_answered
        finally:
            if not record.is_answered:
                self._count(scope, record.status or _CLIENT_DISCONNECTED)
            deadline: Deadline | None = state.get("deadline")
            record.timed_out = deadline is not None and deadline.has_passed
            if self._log_requests:
                _logger.info(record.line(scope["method"], scope["path"]))


def record_of(request: Request) -> RequestRecord:
    """Return the record that the middleware made for a request."""
    record: RequestRecord = request.state.record
    return record


def write_log_to(stream: TextIO) -> None:
    """Write bare log lines to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the client's request id if it sent exactly one valid id, otherwise a new one."""
    ids = [value for name, value in headers if name == _HEADER]
    if len(ids) == 1 and _VALID_ID.fullmatch(ids[0]):
        return ids[0].decode()
    return uuid.uuid4().hex


def _truncated(prompt: str | list[int]) -> str | list[int]:
    return (
        shorten(prompt, MAX_PROMPT_CHARACTERS)
        if isinstance(prompt, str)
        else prompt[: MAX_PROMPT_CHARACTERS // 2]
    )
