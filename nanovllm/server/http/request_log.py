"""A name for every request, and a line about each for those who run the server.

Every answer carries `x-request-id`: the client's own where it sent a valid one, so that its logs and ours can be laid side by side,
otherwise a new one. With `log_requests` one JSON object a request goes to the logger `nanovllm.requests` when the answer has ended, a
stream at its last byte:

    {"time": "2026-01-31T12:00:00.000+00:00", "request_id": "...", "method": "POST", "path": "/v1/completions", "status": 200,
     "duration_ms": 41.7, "prompt_tokens": 5, "completion_tokens": 16, "client_gone": false, "timed_out": false, "answer_id": "cmpl-..."}

Prompts are people's own words: they are in it only with `log_prompts`. Plain ASGI, so that nothing is buffered on the way.
"""

import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TextIO

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.engine.admission import HeldMemory
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.engine.request_handle import Deadline
from nanovllm.server.http.errors import shorten

MAX_PROMPTS = 10
MAX_PROMPT_CHARACTERS = 2000  # of each; of a prompt of token ids, half as many ids
_HEADER = b"x-request-id"
_VALID_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_logger = logging.getLogger("nanovllm.requests")


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request. The middleware fills in how it was answered, the handler what it was about.

    Attributes:
        status: of the answer; None until it begins.
        is_answered: the last byte has been handed on.
        client_gone: the connection was closed before that, or the client stopped reading.
        deadline: when the answer was due, where it was.
        answer_id: the `id` in the answer.
        prompt_tokens: of what was found to be right; None before.
        completion_tokens: generated for the answer; None where nothing was begun.
        keeps_prompts: they are to be logged.
        held: what is given back when the answer has ended, whatever happens.
        client: who it counts for where clients take turns: an address, or one of the API keys.
    """

    request_id: str
    client: str = ""
    arrived_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    arrived_s: float = field(default_factory=time.monotonic)
    status: int | None = None
    is_answered: bool = False
    client_gone: bool = False
    deadline: Deadline | None = None
    answer_id: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    keeps_prompts: bool = False
    prompts: Sequence[str | list[int]] | None = None
    held: list[HeldMemory] = field(default_factory=list)

    def note_prompts(self, prompts: Sequence[str | list[int]]) -> None:
        """What was asked, as it came; kept only where prompts are logged."""
        self.prompts = prompts if self.keeps_prompts else None

    def note_answers(self, prepared_requests: Sequence[PreparedRequest]) -> None:
        """How much has been generated, once the answer has ended or nobody waits for it."""
        self.completion_tokens = sum(
            prepared.output_processor.num_output_tokens for prepared in prepared_requests
        )

    def line(self, method: str, path: str) -> str:
        """The request as one line of JSON in ASCII: nothing that a client sends can break the line or pass for another."""
        fields: dict[str, Any] = {
            "time": self.arrived_at.isoformat(timespec="milliseconds"), "request_id": self.request_id, "method": shorten(method),
            "path": shorten(path), "status": self.status, "duration_ms": round(1000 * (time.monotonic() - self.arrived_s), 3),
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "client_gone": self.client_gone,
            "timed_out": self.deadline is not None and self.deadline.has_passed, "answer_id": self.answer_id,
        }  # fmt: skip
        if self.prompts is not None:
            fields["prompts"] = [_cut(prompt) for prompt in self.prompts[:MAX_PROMPTS]]
        return json.dumps(fields)


class RequestLogMiddleware:
    """Names every request, and logs it where that is wanted. The outermost layer: what the others refuse is named and logged too."""

    def __init__(self, app: ASGIApp, *, log_requests: bool, log_prompts: bool = False) -> None:
        """Watch over `app`; without `log_requests` requests only get their names."""
        self._app = app
        self._log_requests = log_requests
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, watching what comes and goes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(
            _request_id(scope["headers"]),
            client=_address(scope.get("client")),
            keeps_prompts=self._log_prompts,
        )
        scope.setdefault("state", {})["record"] = record

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not record.is_answered:
                record.client_gone = True
            return message

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {
                    **message,
                    "headers": [*message.get("headers", ()), (_HEADER, record.request_id.encode())],
                }
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                record.is_answered = True  # before it is sent: afterwards the server reports every connection as closed
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
            record.client_gone = (
                record.client_gone or not record.is_answered
            )  # a stream that ends early had nobody to go on for
        finally:
            for memory in record.held:
                memory.release()
            if self._log_requests:
                _logger.info(record.line(scope["method"], scope["path"]))


def record_of(request: Request) -> RequestRecord:
    """The record of a request that came through the middleware, for its handler to fill in."""
    record: RequestRecord = request.state.record
    return record


def write_log_to(stream: TextIO) -> None:
    """Let the log's lines, as they are and nothing else, go to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's name for its request, where it sent exactly one that is fit for a header and a log; otherwise a new one."""
    given = [value for name, value in headers if name == _HEADER]
    if len(given) == 1 and _VALID_ID.fullmatch(given[0]):
        return given[0].decode()
    return uuid.uuid4().hex


def _address(client: Sequence[object] | None) -> str:
    """The other side's address without its port; connections of one machine are one client."""
    return str(client[0]) if client else ""


def _cut(prompt: str | list[int]) -> str | list[int]:
    return (
        shorten(prompt, MAX_PROMPT_CHARACTERS)
        if isinstance(prompt, str)
        else prompt[: MAX_PROMPT_CHARACTERS // 2]
    )
