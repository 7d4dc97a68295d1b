"""The error format, {"error": {"message", "type", "param", "code"}}, and the exception handlers.

Quoted input is truncated, so that a response is never many times larger than its request.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from typing_extensions import TypedDict

from nanovllm.errors import (
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
    NanovllmError,
    QueueFullError,
    RequestTimeoutError,
)
from nanovllm.suggestions import suggest

MAX_INPUT_CHARACTERS = 200
MAX_MESSAGE_CHARACTERS = 2000
RETRY_AFTER_S = 1
_MAX_GUESSED_PATH = 64  # characters of an unknown path for which one is suggested

_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError",
    404: "NotFoundError", 405: "MethodNotAllowedError", 408: "RequestTimeoutError",
    413: "RequestTooLargeError", 429: "RateLimitError", 500: "InternalServerError",
    503: "ServiceUnavailableError", 504: "TimeoutError",
}  # fmt: skip


class Error(TypedDict):
    """What went wrong."""

    message: str
    type: Annotated[str, Field(json_schema_extra={"enum": [*_TYPES.values(), "APIError"]})]
    param: Annotated[str | None, Field(description="the field at fault, where it is one")]
    code: Annotated[
        int, Field(json_schema_extra={"enum": list(_TYPES)}, description="the HTTP status")
    ]


class ClientDisconnectedError(Exception):
    """The client closed its connection before its answer was ready."""


class InvalidBodyError(InvalidRequestError):
    """A body that does not match its model; the message lists the problems, each truncated."""


class ErrorAnswer(TypedDict):
    """The form of all errors, except in the streams of /v1/responses."""

    error: Error


class ModelNotServedError(NanovllmError):
    """The request names a model that this server does not serve."""

    param = "model"


def served_name(name: str | None, names: Sequence[str]) -> str:
    """Return the requested model name, by default the first; raises ModelNotServedError."""
    if name is not None and name not in names:
        raise ModelNotServedError(
            f"the model {shorten(name)!r} is not served here; served: {', '.join(names)}"
        )
    return name or names[0]


def error_body(status: int, message: str, param: str | None = None) -> ErrorAnswer:
    """Return the body of an error response."""
    return {
        "error": {
            "message": message,
            "type": _TYPES.get(status, "APIError"),
            "param": param,
            "code": status,
        }
    }


def error_response(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an error response, with Retry-After for 429 and 503."""
    if status in (429, 503):
        headers = {"retry-after": str(RETRY_AFTER_S), **(headers or {})}
    body = json.dumps(error_body(status, message, param))  # ASCII, also for lone surrogates
    return Response(body, status, headers=dict(headers or {}), media_type="application/json")


def _unknown_path(app: FastAPI, path: str) -> str:
    """Return the message for an unknown path, with a suggestion such as the path under /v1."""
    known = [route.path for route in app.routes if isinstance(route, Route)]
    near = suggest(path[:_MAX_GUESSED_PATH], known, min_similarity=0.8)
    return f"there is no such path; {f'did you mean {near}?' if near else '/docs lists them'}"


def shorten(text: str, limit: int = MAX_INPUT_CHARACTERS) -> str:
    """Truncate `text` to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def response_for(error: Exception) -> Response:
    """Return the error response for an exception."""
    status, message, param = problem_of(error)
    return error_response(status, message, param, _retry_headers(error))


def _retry_headers(error: Exception) -> dict[str, str]:
    """Return Retry-After, or tell the official clients not to retry a request that timed out."""
    if isinstance(error, RequestTimeoutError) and error.has_begun:
        return {"x-should-retry": "false"}
    return (
        {"retry-after": str(error.retry_after_s)}
        if isinstance(error, QueueFullError | RequestTimeoutError)
        else {}
    )


def error_of(error: Exception) -> Error:
    """Return the error object for an exception."""
    return error_body(*problem_of(error))["error"]


def problem_of(error: Exception) -> tuple[int, str, str | None]:
    """Return the status, the message and the field at fault of an exception."""
    message = (
        str(error)
        if isinstance(error, NanovllmError)
        else "the server failed; its log has the reason"
    )
    if not isinstance(error, InvalidBodyError):
        message = shorten(message, MAX_MESSAGE_CHARACTERS)
    return status_of(error), message, getattr(error, "param", None)


def status_of(error: Exception) -> int:
    """Return the HTTP status of an exception."""
    if isinstance(error, RequestTimeoutError):
        return 504 if error.has_begun else 503
    statuses: list[tuple[type[Exception], int]] = [
        (InvalidRequestError, 400), (ModelNotServedError, 404), (QueueFullError, 429),
        (EngineNotReadyError, 503), (EngineFaultError, 500),
    ]  # fmt: skip
    return next((status for kind, status in statuses if isinstance(error, kind)), 500)


def install(app: FastAPI) -> None:
    """Add the exception handlers to `app`."""

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = _unknown_path(app, request.url.path) if error.status_code == 404 else error.detail
        message = f"{request.method} {shorten(request.url.path)}: {detail}"
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"  # see HeadMiddleware
        return error_response(error.status_code, message, headers=headers)

    async def on_error(request: Request, error: Exception) -> Response:
        return response_for(error)

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(NanovllmError, on_error)
    app.add_exception_handler(ClientDisconnectedError, on_disconnect)
    app.add_exception_handler(Exception, on_error)
