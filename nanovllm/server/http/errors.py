"""The error format, {"error": {"message", "type", "param", "code"}}, and the exception handlers.

Quoted input is truncated, so that a response is never many times larger than its request.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route
from typing_extensions import TypedDict

from nanovllm.errors import (
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


_STATUSES: dict[type[Exception], int] = {
    InvalidRequestError: 400, ModelNotServedError: 404, QueueFullError: 429,
    EngineNotReadyError: 503, RequestTimeoutError: 503,
}  # fmt: skip
"""Statuses of exceptions; 500 for any other one."""


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


def _allowed_methods(app: FastAPI, request: Request) -> list[str]:
    """Return the methods of all routes of a path; HEAD wherever GET is, see HeadMiddleware."""
    routes = (route for route in app.routes if isinstance(route, Route))
    found = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in found for method in route.methods or ()}
    return sorted({*methods, "HEAD"} if "GET" in methods else methods)


def _unknown_path(app: FastAPI, path: str) -> str:
    """Return the message for an unknown path, with a suggestion such as the path under /v1."""
    known = [route.path for route in app.routes if isinstance(route, Route)]
    near = suggest(path[:_MAX_GUESSED_PATH], known, min_similarity=0.8)
    return f"there is no such path; {f'did you mean {near}?' if near else '/docs lists them'}"


def shorten(text: str, limit: int = MAX_INPUT_CHARACTERS) -> str:
    """Truncate `text` to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Problem(NamedTuple):
    """An exception as clients see it: the arguments of `error_response`."""

    status: int
    message: str
    param: str | None
    headers: Mapping[str, str]

    @property
    def body(self) -> ErrorAnswer:
        """The body of its response."""
        return error_body(self.status, self.message, self.param)


def problem_of(error: Exception) -> Problem:
    """Return what clients see of an exception.

    The official clients retry on 429 and 503, after Retry-After, but not where a retry would
    compute the same again.
    """
    status = next((status for kind, status in _STATUSES.items() if isinstance(error, kind)), 500)
    headers: dict[str, str] = {}
    if isinstance(error, RequestTimeoutError) and error.has_begun:
        status, headers = 504, {"x-should-retry": "false"}
    elif isinstance(error, QueueFullError | RequestTimeoutError):
        headers = {"retry-after": str(error.retry_after_s)}
    is_ours = isinstance(error, NanovllmError)
    message = str(error) if is_ours else "the server failed; its log has the reason"
    if not isinstance(error, InvalidBodyError):
        message = shorten(message, MAX_MESSAGE_CHARACTERS)
    return Problem(status, message, getattr(error, "param", None), headers)


def install(app: FastAPI) -> None:
    """Add the exception handlers to `app`."""

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = _unknown_path(app, request.url.path) if error.status_code == 404 else error.detail
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_allowed_methods(app, request))
            detail = f"Method Not Allowed, use {headers['Allow']}"
        message = f"{request.method} {shorten(request.url.path)}: {detail}"
        return error_response(error.status_code, message, headers=headers)

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(*problem_of(error))

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(NanovllmError, on_error)
    app.add_exception_handler(ClientDisconnectedError, on_disconnect)
    app.add_exception_handler(Exception, on_error)
