"""The OpenAPI document of all routes, errors and events included.

FastAPI writes it from the decorators of the routes, whose arguments `operation` returns. It only
documents: the framework neither validates nor serializes responses.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
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


class _Reference(dict[str, Any]):
    """A reference to the schema of a type, which `_complete` adds to the document."""

    def __init__(self, kind: Any) -> None:
        super().__init__({"$ref": _REF.format(model=kind.__name__)})
        self.kind = kind


def operation(
    *errors: int,
    response: Any = None,
    body: type[BaseModel] | None = None,
    query: type[BaseModel] | None = None,
    event: Any = None,
    event_name: str | None = None,
    ends_with_done: bool = True,
) -> dict[str, Any]:
    """Return the arguments of a route's decorator that describe it.

    Args:
        errors: their statuses, without those that every route can have.
        response: the type of a whole response; None if there is none.
        body: the type of the body, which the route reads itself.
        query: the type of the query, which the route checks itself.
        event: the type of an event's data, if the response can be streamed.
        event_name: the name of all events, if they have one.
        ends_with_done: whether a stream ends with [DONE], with any error as the event before it;
            otherwise its events have names, and the last one reports an error.
    """
    extra: dict[str, Any] = {}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": _json_content(body)}
    if query is not None:
        extra["parameters"] = list(_parameters(query))
    whole: dict[str, Any] = {"description": "The response."}
    if event is not None:
        schema = _event_schema(event, event_name, ends_with_done=ends_with_done)
        whole["content"] = {"text/event-stream": {"itemSchema": schema}}
        whole["description"] = "Server-sent events."
    if event is not None and event_name is None:
        end = (
            "The last event is `[DONE]`; the one before it is an error if the response fails."
            if ends_with_done
            else "The last event is `response.failed` if the response fails."
        )
        whole["description"] = (
            "The response, whole or with `stream` as server-sent events. "
            f"{end} Blank lines may stand between events."
        )
    return {
        "response_model": response,
        "responses": {200: whole, **{status: _error(status) for status in errors}},
        "openapi_extra": extra or None,
    }


def install(app: FastAPI, *, has_keys: bool, checks_host: bool = False) -> None:
    """Complete the document of `app` with the responses of its middleware.

    Args:
        has_keys: whether clients need an API key.
        checks_host: whether requests for other hosts are refused.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate(), app, has_keys=has_keys, checks_host=checks_host)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any], app: FastAPI, *, has_keys: bool, checks_host: bool) -> None:
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    # The framework would round limits of integers, such as a 64-bit seed's.
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    for kind in _kinds([[route.responses, route.openapi_extra] for route in routes]):
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
        for described_operation in operations.values():
            described_operation["tags"] = [tag]
            _complete_operation(described_operation, needs_key=needs_key, checks_host=checks_host)


def _kinds(described: Any) -> set[Any]:
    """Return the types of all references in a description."""
    if isinstance(described, _Reference):
        return {described.kind}
    items = described.values() if isinstance(described, Mapping) else described
    return set().union(*map(_kinds, items)) if isinstance(described, Mapping | list) else set()


def _complete_operation(described: dict[str, Any], *, needs_key: bool, checks_host: bool) -> None:
    """Add the responses of middleware; drop the framework's 422, which is a 400 here."""
    responses = described["responses"]
    responses.pop("422", None)
    everywhere = (
        413,
        500,
        *((401,) if needs_key else ()),
        *((403,) if checks_host else ()),
        *((408,) if "requestBody" in described else ()),
    )
    responses.update({str(status): _error(status) for status in everywhere})
    for response in responses.values():
        response["headers"] = {**response.get("headers", {}), "x-request-id": _REQUEST_ID}
    described["responses"] = dict(sorted(responses.items()))
    if needs_key:
        described["security"] = [{_KEY_SCHEME: []}]


def _error(status: int) -> dict[str, Any]:
    return {
        "description": _WHY[status],
        "headers": _HEADERS.get(status, {}),
        "content": _json_content(ErrorAnswer),
    }


def _json_content(kind: Any) -> dict[str, Any]:
    return {"application/json": {"schema": _Reference(kind)}}


def _parameters(query: type[BaseModel]) -> Iterator[dict[str, Any]]:
    """Yield the description of each field of a query."""
    for name, field in query.model_json_schema()["properties"].items():
        description = field.pop("description", "")
        options = [option for option in field.get("anyOf", ()) if option.get("type") != "null"]
        schema = options[0] if options else field
        yield {"name": name, "in": "query", "schema": schema, "description": description}


def _event_schema(event: Any, name: str | None, *, ends_with_done: bool) -> dict[str, Any]:
    """Return the schema of a stream's events, as OpenAPI 3.2 has them."""
    if ends_with_done and name is None:
        done = {"type": "string", "const": "[DONE]"}
        data = {"anyOf": [done, _json_text(event, ErrorAnswer)]}
        return {"type": "object", "required": ["data"], "properties": {"data": data}}
    name_schema = {"type": "string"} if name is None else {"type": "string", "const": name}
    return {
        "type": "object",
        "required": ["event", "data"],
        "properties": {"event": name_schema, "data": _json_text(event)},
    }


def _json_text(*kinds: Any) -> dict[str, Any]:
    """Return the schema of a text that is the JSON of one of these types."""
    content = {"anyOf": list(map(_Reference, kinds))}
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
