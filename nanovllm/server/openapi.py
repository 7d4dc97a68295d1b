"""The OpenAPI document of all routes, errors and events included.

It only documents: the framework neither validates nor serializes responses.
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
    403: "The Host header names another host, or the request is not allowed.",
    404: "The model is not served here.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the server takes.",
    429: "The queue is full.",
    500: "A fault of the server, whose log has the reason.",
    503: "The model is loading, the server is stopping, or the deadline passed in the queue.",
    504: "The deadline passed before the response was complete.",
}
_REQUEST_ID = {
    "schema": {"type": "string"},
    "required": True,
    "description": "the request's id; the client's own if it sent one",
}
_RETRY_AFTER = {
    "schema": {"type": "integer", "minimum": 0},
    "required": True,
    "description": "seconds after which to try again",
}
_SHOULD_RETRY = {
    "schema": {"type": "string", "const": "false"},
    "required": True,
    "description": "a retry would compute the same again",
}
_AUTHENTICATE = {"schema": {"type": "string", "const": "Bearer"}, "required": True}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"www-authenticate": _AUTHENTICATE}, 429: {"retry-after": _RETRY_AFTER},
    503: {"retry-after": _RETRY_AFTER}, 504: {"x-should-retry": _SHOULD_RETRY},
}  # fmt: skip
_KEY_SCHEME = "api_key"
_TAGS = (
    ("engine", "The engine at work: state, events, steps, pause.", ("/v1/engine/",)),
    ("inspection", "What the model does with one prompt.", ("/v1/inspect/",)),
    ("OpenAI", "OpenAI's endpoints: text, chats, embeddings, models.", ("/v1/",)),
    ("tokens", "Texts and token ids.", ("/tokenize", "/detokenize")),
    ("status", "Health, load, version and metrics.", ("/",)),
)
"""The groups of the document: name, description and the beginnings of their paths, first match."""


def responses(
    *errors: int, whole: Any = None, event: Any = None, ends_with_done: bool = True
) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route.

    Args:
        errors: their statuses, without those that every route can have.
        whole: the type of the response; None if the route documents it otherwise.
        event: the type of an event's data, if the response can be streamed.
        ends_with_done: whether a stream ends with [DONE], with any error as the event before it;
            otherwise its events have names, and the last one reports an error.
    """
    documented: dict[int | str, dict[str, Any]] = {status: _error(status) for status in errors}
    if whole is not None:
        documented[200] = {"model": whole, "description": "The response."}
    if event is not None:
        end = (
            "The last event is `[DONE]`; the one before it is an error if the response fails."
            if ends_with_done
            else "The last event is `response.failed` if the response fails."
        )
        documented[200]["description"] = (
            "The response, whole or with `stream` as server-sent events. "
            f"{end} Blank lines may stand between events."
        )
        schema = _event_schema(event) if ends_with_done else _named_event_schema(event)
        documented[200]["content"] = {"text/event-stream": {"itemSchema": schema}}
    return documented


def event_responses(*errors: int, name: str, event: Any) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route whose response is a stream of events of one name."""
    schema = _named_event_schema(event)
    schema["properties"]["event"]["const"] = name
    stream = {"text/event-stream": {"itemSchema": schema}}
    return {**responses(*errors), 200: {"description": "Server-sent events.", "content": stream}}


def query_parameter(name: str, limit: int, description: str) -> dict[str, Any]:
    """Return the `openapi_extra` of a route with an optional number in its query."""
    schema = {"type": "integer", "minimum": 1, "maximum": limit}
    parameter = {"name": name, "in": "query", "schema": schema, "description": description}
    return {"parameters": [parameter]}


def request_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that reads its body itself."""
    schema = {"$ref": _REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install(
    app: FastAPI, kinds: Sequence[Any], *, has_keys: bool, checks_host: bool = False
) -> None:
    """Complete the document of `app` with the responses of its middleware.

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
    # The framework does not know events, and rounds limits of integers, such as a 64-bit seed's.
    for kind in (ErrorAnswer, *kinds):
        schema = TypeAdapter(kind).json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
    if has_keys:
        document["components"]["securitySchemes"] = {
            _KEY_SCHEME: {"type": "http", "scheme": "bearer"}
        }
    document["tags"] = [{"name": name, "description": about} for name, about, _ in _TAGS]
    for path, operations in document["paths"].items():
        tag = next(name for name, _, beginnings in _TAGS if path.startswith(beginnings))
        needs_key = has_keys and path not in OPEN_PATHS
        for operation in operations.values():
            operation["tags"] = [tag]
            _complete_operation(operation, needs_key=needs_key, checks_host=checks_host)


def _complete_operation(operation: dict[str, Any], *, needs_key: bool, checks_host: bool) -> None:
    """Add the responses of middleware; drop the framework's 422, which is a 400 here."""
    documented = operation["responses"]
    documented.pop("422", None)
    content = documented["200"].get("content", {})
    if "text/event-stream" in content and content.get("application/json") == {"schema": {}}:
        del content["application/json"]  # the framework's default, of a route that only streams
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
        documented[str(status)] = {
            **described,
            "content": {
                "application/json": {"schema": {"$ref": _REF.format(model=ErrorAnswer.__name__)}}
            },
        }
    for response in documented.values():
        response.setdefault("headers", {})["x-request-id"] = _REQUEST_ID
    operation["responses"] = dict(sorted(documented.items()))
    if needs_key:
        operation["security"] = [{_KEY_SCHEME: []}]


def _error(status: int) -> dict[str, Any]:
    return {
        "model": ErrorAnswer,
        "description": _WHY[status],
        "headers": dict(_HEADERS.get(status, {})),
    }


def _event_schema(event: Any) -> dict[str, Any]:
    """Return the schema of a stream's events, as OpenAPI 3.2 has them: data, errors and [DONE]."""
    done = {"type": "string", "const": "[DONE]"}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [done, _json_schema(event, ErrorAnswer)]}},
    }


def _named_event_schema(event: Any) -> dict[str, Any]:
    """Return the schema of a stream's events that have names."""
    return {
        "type": "object",
        "required": ["event", "data"],
        "properties": {"event": {"type": "string"}, "data": _json_schema(event)},
    }


def _json_schema(*kinds: Any) -> dict[str, Any]:
    """Return the schema of a text that is the JSON of one of these types."""
    content = {"anyOf": [{"$ref": _REF.format(model=kind.__name__)} for kind in kinds]}
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
