"""The OpenAPI document: what every route answers, errors included, so that programs and fuzzers can take it at its word.

It is for reading only: routes give finished responses, which the framework neither checks nor writes again.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter

from nanovllm.server.http.auth import OPEN_PATHS
from nanovllm.server.http.errors import ErrorAnswer

_REF = "#/components/schemas/{model}"
_WHY = {
    400: "What is wrong with the request, field by field.",
    401: "The API key is missing or wrong.",
    403: "The Host header names another host.",
    404: "The model is not served here.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the server takes.",
    429: "The queue is full.",
    500: "A fault of the server, whose log has the reason.",
    503: "The model is loading, the server is stopping, or the request's time was over before it began.",
    504: "The request's time was over before its answer was complete.",
}
_REQUEST_ID = {
    "schema": {"type": "string"},
    "required": True,
    "description": "the request's name, the client's own where it sent one",
}
_RETRY_AFTER = {
    "schema": {"type": "integer", "minimum": 0},
    "required": True,
    "description": "seconds after which to try again",
}
_SHOULD_RETRY = {
    "schema": {"type": "string", "const": "false"},
    "required": True,
    "description": "the same would be computed again",
}
_AUTHENTICATE = {"schema": {"type": "string", "const": "Bearer"}, "required": True}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"www-authenticate": _AUTHENTICATE}, 429: {"retry-after": _RETRY_AFTER}, 503: {"retry-after": _RETRY_AFTER},
    504: {"x-should-retry": _SHOULD_RETRY},
}  # fmt: skip
_KEY_SCHEME = "api_key"


def answers(*errors: int, whole: Any = None, chunk: Any = None) -> dict[int | str, dict[str, Any]]:
    """A route's answers, for its `responses`.

    Args:
        errors: their statuses, without those that every route can give.
        whole: the type of the answer; None where the route says it in another way.
        chunk: the type of an event's data where the answer can be streamed.
    """
    found: dict[int | str, dict[str, Any]] = {status: _error(status) for status in errors}
    if whole is not None:
        found[200] = {"model": whole, "description": "The answer."}
    if chunk is not None:
        found[200]["description"] = (
            "The answer, whole or with `stream` as events: chunks, or an error in place of the rest, then `data: [DONE]`. "
            "Comments (`: keep-alive`) may stand between events."
        )
        found[200]["content"] = {"text/event-stream": {"itemSchema": _event_schema(chunk)}}
    return found


def request_body(kind: type[BaseModel]) -> dict[str, Any]:
    """What a route that reads its body itself gives as its `openapi_extra`."""
    schema = {"$ref": _REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install(
    app: FastAPI, kinds: Sequence[Any], *, has_keys: bool, checks_host: bool = False
) -> None:
    """Make the document of `app` say what its layers answer too.

    Args:
        kinds: the types of bodies and of events' data.
        has_keys: whether clients need an API key.
        checks_host: whether requests for other hosts are refused.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate(), kinds, has_keys=has_keys, checks_host=checks_host)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(
    document: dict[str, Any], kinds: Sequence[Any], *, has_keys: bool, checks_host: bool
) -> None:
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for kind in (
        ErrorAnswer,
        *kinds,
    ):  # the framework knows no events, and rounds the limits of whole numbers: a seed's are 64 bits
        schema = TypeAdapter(kind).json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
    if has_keys:
        document["components"]["securitySchemes"] = {
            _KEY_SCHEME: {"type": "http", "scheme": "bearer"}
        }
    for path, operations in document["paths"].items():
        needs_key = has_keys and path not in OPEN_PATHS
        for operation in operations.values():
            _complete_operation(operation, needs_key=needs_key, checks_host=checks_host)


def _complete_operation(operation: dict[str, Any], *, needs_key: bool, checks_host: bool) -> None:
    """Add what the layers around a route answer; a body that is not valid is a 400 here, never the framework's 422."""
    responses = operation["responses"]
    responses.pop("422", None)
    everywhere = (
        413,
        500,
        *((401,) if needs_key else ()),
        *((403,) if checks_host else ()),
        *((408,) if "requestBody" in operation else ()),
    )
    for status in everywhere:
        described = _error(status)
        del described["model"]
        responses[str(status)] = {
            **described,
            "content": {
                "application/json": {"schema": {"$ref": _REF.format(model=ErrorAnswer.__name__)}}
            },
        }
    for response in responses.values():
        response.setdefault("headers", {})["x-request-id"] = _REQUEST_ID
    operation["responses"] = dict(sorted(responses.items()))
    if needs_key:
        operation["security"] = [{_KEY_SCHEME: []}]


def _error(status: int) -> dict[str, Any]:
    return {
        "model": ErrorAnswer,
        "description": _WHY[status],
        "headers": dict(_HEADERS.get(status, {})),
    }


def _event_schema(chunk: Any) -> dict[str, Any]:
    """An event of a stream, as OpenAPI 3.2 describes them and tools for 3.1 read them too."""
    data = {
        "anyOf": [
            {"$ref": _REF.format(model=name)} for name in (chunk.__name__, ErrorAnswer.__name__)
        ]
    }
    whole = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"type": "string", "const": "[DONE]"}, whole]}},
    }
