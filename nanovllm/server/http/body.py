"""Read a request's body or query and validate it; a large body on a worker thread."""

import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from nanovllm.errors import InvalidRequestError
from nanovllm.server.http.bounded_model import integer_fields
from nanovllm.server.http.errors import ClientDisconnectedError, InvalidBodyError, shorten
from nanovllm.server.http.json_io import read_json
from nanovllm.server.http.validation_errors import describe_problems
from nanovllm.server.http.worker_pools import WorkerPools

B = TypeVar("B", bound=BaseModel)
_INTEGER = re.compile(r"[0-9]{1,12}")

INLINE_BYTES = 1 << 11
"""Largest body that is parsed on the event loop: handing it to a thread takes longer."""


async def read_body(request: Request, kind: type[B], work: WorkerPools) -> tuple[B, int]:
    """Return a request's validated body and its size in bytes.

    Raises:
        InvalidRequestError: the body does not match `kind`.
        QueueFullError: too many large bodies wait to be read.
        ClientDisconnectedError: the client closed its connection.
        RequestTimeoutError: the request's deadline has passed.
    """
    try:
        content = await request.body()
    except ClientDisconnect as error:
        raise ClientDisconnectedError from error
    media_type = request.headers.get("content-type", "")
    if len(content) <= INLINE_BYTES:
        return parse_body(content, media_type, kind), len(content)
    body = await work.read(request, len(content), lambda: parse_body(content, media_type, kind))
    return body, len(content)


def parse_body(content: bytes, media_type: str, kind: type[B]) -> B:
    """Parse and validate a body; raises InvalidRequestError."""
    if not content or not _is_json(media_type):
        given = f"Content-Type: {media_type}" if media_type else "no Content-Type"
        quoted = f" (given: {shorten(given)})" if content else ""
        raise InvalidRequestError(
            f"the body must be a JSON object, sent with Content-Type: application/json{quoted}"
        )
    try:
        body = read_json(content)
    except ValueError as error:
        reason = shorten(str(error))
        raise InvalidRequestError(f"the body cannot be read as JSON: {reason}") from error
    return check_body(body, kind)


def check_body(body: object, kind: type[B]) -> B:
    """Validate a parsed body; raises InvalidBodyError that lists its problems."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        message, param = describe_problems(error.errors(include_url=False), kind)
        raise InvalidBodyError(message, param=param) from error


def check_query(request: Request, kind: type[B]) -> B:
    """Return the query of a request, with numbers in the fields that are integers.

    Raises InvalidBodyError that lists its problems.
    """
    integers = integer_fields(kind)
    return check_body(
        {
            name: int(text) if name in integers and _INTEGER.fullmatch(text) else text
            for name, text in request.query_params.items()
        },
        kind,
    )


def _is_json(media_type: str) -> bool:
    """Return whether a Content-Type is JSON.

    Browsers send other types across origins without a preflight, so those are refused.
    """
    kind, _, subtype = media_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))
