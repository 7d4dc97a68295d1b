"""An OpenAPI document taken at its word: is an answer one of those that it describes?"""

import copy
import json
from collections.abc import Mapping
from typing import Any, Protocol

import jsonschema_rs

METHODS = ("get", "post", "put", "delete", "patch", "head", "options", "trace")


class SomeResponse(Protocol):
    """What httpx, requests and schemathesis have in common."""

    status_code: int

    @property
    def headers(self) -> Mapping[str, Any]: ...

    @property
    def content(self) -> bytes: ...


def closed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document with no additional fields allowed, so that a field it lacks is found."""
    copied: dict[str, Any] = copy.deepcopy(dict(document))
    for schema in copied["components"]["schemas"].values():
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return copied


class Contract:
    """What a document promises."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """Read a document."""
        self.document = closed(document)
        self._validators: dict[int, Any] = {}

    @property
    def operations(self) -> list[tuple[str, str]]:
        """(method in capitals, path) of every operation."""
        return [
            (method.upper(), path)
            for path, item in self.document["paths"].items()
            for method in METHODS
            if method in item
        ]

    def statuses(self, method: str, path: str) -> set[int]:
        """Those that the operation may answer."""
        return {int(status) for status in self._operation(method, path)["responses"]}

    def check(self, method: str, path: str, response: SomeResponse) -> None:
        """Fail unless the operation describes the answer's status, headers, type and content."""
        described = self._operation(method, path)["responses"].get(str(response.status_code))
        assert described is not None, (
            f"{method} {path} does not say that it answers {response.status_code}: "
            f"{response.content[:500]!r}"
        )
        for name, header in described.get("headers", {}).items():
            value = _first(response.headers.get(name))
            assert value is not None or not header["required"], f"the header {name} is missing"
            self._validate(
                header["schema"],
                int(value)
                if header["schema"]["type"] == "integer" and value is not None
                else value,
            )
        media_type = (_first(response.headers.get("content-type")) or "").partition(";")[0]
        assert media_type in described["content"], (
            f"{method} {path} {response.status_code} does not say that it answers {media_type!r}"
        )
        schema = described["content"][media_type]
        if media_type == "text/event-stream":
            self._check_events(schema["itemSchema"], response.content)
        elif media_type == "application/json":
            self._validate(schema["schema"], json.loads(response.content))
        else:
            self._validate(schema["schema"], response.content.decode())

    def _operation(self, method: str, path: str) -> dict[str, Any]:
        operation: dict[str, Any] = self.document["paths"][path][method.lower()]
        return operation

    def _check_events(self, schema: dict[str, Any], content: bytes) -> None:
        *parts, rest = content.decode().split("\n\n")
        assert rest == ""
        events = [
            dict(line.split(": ", 1) for line in part.split("\n"))
            for part in parts
            if not part.startswith(":")  # comments
        ]
        for event in events:
            self._validate(schema, event)
        data = schema["properties"]["data"]
        *_, encoded = data.get("anyOf", [data])
        has_one_name = "const" in schema["properties"].get("event", {})
        if has_one_name:
            assert events
        elif "event" in schema["properties"]:
            assert events[-1]["event"].partition(".")[2] in ("completed", "incomplete", "failed")
        else:
            assert events.pop()["data"] == "[DONE]"
        for event in events:
            content_value = json.loads(event["data"])
            self._validate(encoded["contentSchema"], content_value)
            assert has_one_name or event.get("event") == content_value.get("type")

    def _validate(self, schema: dict[str, Any], value: Any) -> None:
        validator = self._validators.get(id(schema))  # they live as long as the document
        if validator is None:
            validator = jsonschema_rs.validator_for(
                {**schema, "components": self.document["components"]}
            )
            self._validators[id(schema)] = validator
        validator.validate(value)


def _first(value: Any) -> str | None:
    """A header's value; schemathesis gives a list of them."""
    text: str | None = value[0] if isinstance(value, list) else value
    return text
