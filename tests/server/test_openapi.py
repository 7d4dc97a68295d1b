"""The API document is right: real answers of every route, good and bad, are as it describes."""

import threading
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanovllm.engine.engine import Engine
from tests.support.fuzzing import KEY, TEMPLATE
from tests.support.openapi import Contract
from tests.support.serving import RunningServer, loader

MESSAGES = [{"role": "user", "content": "the"}]
LOGPROBS = {
    "logprobs": 3,
    "prompt_logprobs": 2,
    "echo": True,
    "return_token_ids": True,
    "return_drafted_token_ids": True,
    "return_tokens_as_token_ids": True,
}
USAGE = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
LIMIT = 20_000

GOOD: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/health", None),
    ("GET", "/version", None),
    ("GET", "/load", None),
    ("GET", "/metrics", None),
    ("GET", "/tokenizer_info", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/alias", None),
    ("GET", "/v1/engine/state", None),
    ("GET", "/v1/engine/events?frames=1", None),
    ("GET", "/v1/engine/vocabulary", None),
    ("POST", "/v1/completions", {"prompt": "the"}),
    ("GET", "/v1/engine/state", None),
    ("GET", "/v1/engine/steps?last=3", None),
    ("POST", "/v1/engine/control", {"action": "resume"}),
    (
        "POST",
        "/v1/completions",
        {"prompt": ["the", "a"], "n": 2, "temperature": 0, "model": "alias"},
    ),
    ("POST", "/v1/completions", {"prompt": "the", "stop": "e", **LOGPROBS}),
    ("POST", "/v1/completions", {"prompt": [[1, 2]], "max_tokens": 0, "echo": True, "logprobs": 1}),
    ("POST", "/v1/completions", {"prompt": "the", "logit_bias": {"5": 100}, "stop_token_ids": [5]}),
    (
        "POST",
        "/v1/completions",
        {"prompt": "the", "use_beam_search": True, "n": 2, "max_tokens": 3},
    ),
    ("POST", "/v1/completions", {"prompt": "the", "best_of": 3, "n": 1, "max_tokens": 3}),
    ("POST", "/v1/completions", {"prompt": "the", "stream": True}),
    ("POST", "/v1/completions", {"prompt": ["the", "a"], "n": 2, **LOGPROBS, **USAGE}),
    ("POST", "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4}),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 4, "n": 2, "logprobs": True, "top_logprobs": 2},
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_tokens": 4,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            **USAGE,
        },
    ),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 3, "prompt_logprobs": 1, "return_token_ids": True},
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "prompt_logprobs": 1,
            "return_token_ids": True,
            "return_drafted_token_ids": True,
            **USAGE,
        },
    ),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 3, "n": 2, "use_beam_search": True},
    ),
    ("POST", "/v1/responses", {"input": "the", "max_output_tokens": 4}),
    ("POST", "/v1/responses", {"input": MESSAGES, "max_output_tokens": 4, "stream": True}),
    ("POST", "/v1/embeddings", {"input": ["the", "a"]}),
    ("POST", "/v1/embeddings", {"input": [1, 2], "encoding_format": "base64", "pooling": "mean"}),
    ("POST", "/tokenize", {"prompt": "the"}),
    ("POST", "/tokenize", {"prompt": "the", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": MESSAGES, "prompt": None}),
    ("POST", "/detokenize", {"tokens": [1, 2]}),
    ("POST", "/detokenize", {"tokens": [1, 2], "return_token_strs": True}),
]
STORED = "/v1/responses/{response_id}"
SEED_FIELDS = ("CompletionRequest", "ChatRequest")


@pytest.fixture(scope="module")
def guarded(tiny_model: Path) -> Iterator[RunningServer]:
    """A server with a key, a chat template, a small limit of bodies and a short queue."""
    load = loader(tiny_model)
    with RunningServer(
        load,
        api_keys=(KEY,),
        chat_template=TEMPLATE,
        max_body_bytes=LIMIT,
        max_queued_requests=8,
        inspector_controls=True,
    ) as running:
        running.http.headers["authorization"] = f"Bearer {KEY}"
        yield running


@pytest.fixture(scope="module")
def contract(guarded: RunningServer) -> Contract:
    """What its document promises."""
    return Contract(guarded.http.get("/openapi.json").json())


def template_of(path: str) -> str:
    if path.startswith("/v1/models/"):
        return "/v1/models/{model_id}"
    return path.partition("?")[0]


@pytest.mark.parametrize("place", range(len(GOOD)))
def test_an_answer_is_what_the_document_says(
    guarded: RunningServer, contract: Contract, place: int
) -> None:
    method, path, body = GOOD[place]
    response = guarded.http.request(method, path, json=body)
    assert response.status_code == 200, response.text
    contract.check(method, template_of(path), response)


def test_a_stored_response_is_what_the_document_says(
    guarded: RunningServer, contract: Contract
) -> None:
    created = guarded.http.post("/v1/responses", json={"input": "the", "max_output_tokens": 2})
    for status in (200, 404):
        for method in ("GET", "DELETE"):
            response = guarded.http.request(method, f"/v1/responses/{created.json()['id']}")
            assert response.status_code == status
            contract.check(method, STORED, response)
    refused = guarded.http.options(f"/v1/responses/{created.json()['id']}")
    assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET, HEAD")


def test_every_route_is_among_these(contract: Contract) -> None:
    found = {(method, template_of(path)) for method, path, _ in GOOD}
    assert {*found, ("GET", STORED), ("DELETE", STORED)} == set(contract.operations)


def test_every_route_is_in_a_described_group(contract: Contract) -> None:
    tags = {
        path: operation["tags"]
        for path, operations in contract.document["paths"].items()
        for operation in operations.values()
    }
    described = [[tag["name"]] for tag in contract.document["tags"]]
    assert all(tag in described for tag in tags.values())
    assert tags["/v1/engine/state"] == ["engine"]
    assert tags["/v1/completions"] == tags["/v1/models"] == ["OpenAI"]
    assert tags["/tokenizer_info"] == ["tokens"]
    assert tags["/health"] == ["status"]


def test_the_check_itself_finds_what_is_not_described(guarded: RunningServer) -> None:
    """Each of these documents tells one thing wrongly."""

    def lying(path: str, *keys: str, value: Any) -> Contract:
        contract = Contract(guarded.http.get("/openapi.json").json())
        place: Any = contract.document
        for key in keys:
            place = place[key]
        place[path] = value
        return contract

    version, streamed = (
        guarded.http.get("/version"),
        guarded.http.post("/v1/completions", json={"prompt": "a", "stream": True}),
    )
    responses = ("paths", "/version", "get", "responses")
    contracts = [
        lying(
            "version", "components", "schemas", "Version", "properties", value={"type": "integer"}
        ),
        lying("properties", "components", "schemas", "Version", value={}),
        lying(
            "retry-after",
            *responses,
            "200",
            "headers",
            value={"required": True, "schema": {"type": "integer"}},
        ),
        lying("content", *responses, "200", value={"text/plain": {}}),
        lying("responses", *responses[:-1], value={}),
    ]
    for contract in contracts:
        with pytest.raises((AssertionError, ValueError)):
            contract.check("GET", "/version", version)
    with pytest.raises(ValueError, match="is not valid"):
        lying(
            "model",
            "components",
            "schemas",
            "CompletionChunk",
            "properties",
            value={"type": "null"},
        ).check("POST", "/v1/completions", streamed)


def test_errors_are_what_the_document_says(guarded: RunningServer, contract: Contract) -> None:
    json_type = {"content-type": "application/json"}
    posts = [path for method, path in contract.operations if method == "POST"]
    for path in posts:
        field = {
            "/v1/chat/completions": "messages",
            "/v1/responses": "input",
            "/v1/embeddings": "input",
            "/detokenize": "tokens",
            "/v1/engine/control": "action",
        }.get(path, "prompt")
        good: Any = {"messages": MESSAGES, "tokens": [1], "action": "resume"}.get(field, "a")
        found = {
            400: guarded.http.post(path, json={}),
            401: guarded.http.post(path, json={field: good}, headers={"authorization": "Bearer x"}),
            413: guarded.http.post(path, content=b" " * (LIMIT + 1), headers=json_type),
        }
        if path != "/v1/engine/control":  # which names no model
            found[404] = guarded.http.post(path, json={field: good, "model": "other"})
        for status, response in found.items():
            assert response.status_code == status, response.text
            contract.check("POST", path, response)
        assert {*found, 408, 500, 503} <= contract.statuses("POST", path)
    for method, path in contract.operations:
        if path != "/health":
            contract.check(
                method,
                path,
                guarded.http.request(
                    method,
                    path.format(model_id="tiny", response_id="resp_1"),
                    headers={"authorization": ""},
                ),
            )
    contract.check("GET", "/v1/models/{model_id}", guarded.http.get("/v1/models/other"))


def test_a_body_that_stops_coming_is_answered_as_the_document_says(
    tiny_model: Path, contract: Contract
) -> None:
    with RunningServer(loader(tiny_model), stalled_client_s=0.05) as running:
        for path in (path for method, path in contract.operations if method == "POST"):
            connection = HTTPConnection("127.0.0.1", running.port, timeout=20)
            connection.putrequest("POST", path)
            connection.putheader("Content-Length", "10")
            connection.endheaders(b"{")
            with closing(connection), connection.getresponse() as response:
                assert response.status == 408
                contract.check(
                    "POST",
                    path,
                    httpx.Response(
                        response.status, headers=response.getheaders(), content=response.read()
                    ),
                )


def test_a_full_queue_is_answered_as_the_document_says(
    tiny_model: Path, contract: Contract
) -> None:
    body = {"prompt": "a", "n": 8, "stream": True, "max_tokens": 100, "ignore_eos": True}
    with (
        RunningServer(
            loader(tiny_model, step_s=0.02), max_queued_requests=8, chat_template=TEMPLATE
        ) as running,
        running.http.stream("POST", "/v1/completions", json=body) as response,
    ):
        chunks = response.iter_raw()  # kept: the connection closes with it
        next(chunks)
        asked: dict[str, dict[str, Any]] = {
            "/v1/completions": {"prompt": "a"}, "/v1/chat/completions": {"messages": MESSAGES},
            "/v1/responses": {"input": "a"}, "/v1/embeddings": {"input": "a"},
        }  # fmt: skip
        for path, wanted in asked.items():
            refused = running.http.post(path, json=wanted)
            assert refused.status_code == 429
            contract.check("POST", path, refused)


def test_a_loading_server_answers_as_the_document_says(
    tiny_model: Path, contract: Contract
) -> None:
    may_go_on = threading.Event()

    def load() -> Engine:
        assert may_go_on.wait(30)
        return loader(tiny_model)()

    with RunningServer(
        load, wait_until_ready=False, chat_template=TEMPLATE, inspector_controls=True
    ) as running:
        try:
            for method, path, body in GOOD:
                response = running.http.request(method, path, json=body)
                contract.check(method, template_of(path), response)
                assert response.status_code == (200 if path in ("/version", "/metrics") else 503)
        finally:
            may_go_on.set()


def test_a_fault_is_answered_as_the_document_says(
    guarded: RunningServer, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded.metrics, "render", lambda: 1 / 0)
    response = guarded.http.get("/metrics")
    assert response.status_code == 500
    contract.check("GET", "/metrics", response)


def test_without_keys_none_are_documented(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model)) as server:
        document = server.http.get("/openapi.json").json()
        contract = Contract(document)
        assert not any(
            401 in contract.statuses(method, path) for method, path in contract.operations
        )
        assert "securitySchemes" not in document["components"]
        for method, path, body in GOOD[:7]:
            contract.check(method, template_of(path), server.http.request(method, path, json=body))


def test_keys_are_documented_where_they_are_needed(contract: Contract) -> None:
    open_to_all = {
        path
        for method, path in contract.operations
        if "security" not in contract.document["paths"][path][method.lower()]
    }
    assert open_to_all == {"/health"}


def test_limits_of_integers_are_exact(contract: Contract) -> None:
    """A float in between would make them one too many."""
    for name in SEED_FIELDS:
        seed = contract.document["components"]["schemas"][name]["properties"]["seed"]["anyOf"][0]
        assert (seed["minimum"], seed["maximum"]) == (-(2**63), 2**63 - 1)


def test_no_validation_error_of_the_framework_is_left(contract: Contract) -> None:
    assert not any(422 in contract.statuses(method, path) for method, path in contract.operations)
    assert not any("ValidationError" in name for name in contract.document["components"]["schemas"])
