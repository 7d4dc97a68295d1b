"""API keys: what is closed without one, and whose requests the engine runs."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import OpenAI

from nanovllm.engine.admission import RequestSize
from nanovllm.engine.scheduling.request import Request as Sequence
from nanovllm.server.http import auth
from nanovllm.server.service import ServerSettings
from tests.support.guarded import KEY, KEYS, LIMIT, bearer
from tests.support.serving import MODEL, RunningServer, loader, read_error

WRONG_KEYS: dict[str, dict[bytes, bytes]] = {
    "none": {}, "empty": {b"authorization": b"Bearer"}, "another": bearer("secret"),
    "longer": bearer(KEY + "x"), "another case": bearer(KEY.upper()),
    "a part of one": bearer("the last"), "two at once": bearer("first,first"),
    "all": bearer(",".join(KEYS)), "no scheme": {b"authorization": KEY.encode()},
    "basic": bearer(KEY, "Basic"), "no UTF-8": {b"authorization": b"Bearer \xff"},
}  # fmt: skip


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/", "/metrics", "/version", "/docs/", "/nope"]
)
@pytest.mark.parametrize("name", WRONG_KEYS)
def test_without_the_key_everything_is_closed(guarded: RunningServer, name: str, path: str) -> None:
    response = guarded.http.get(path, headers=WRONG_KEYS[name])
    error = read_error(response, 401)
    assert read_error(guarded.http.options(path, headers=WRONG_KEYS[name]), 401) == error
    assert error["type"] == "AuthenticationError"
    assert "Authorization: Bearer" in error["message"]
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_health_is_open(guarded: RunningServer) -> None:
    for path in ("/health", "/health/", "/ping"):
        assert guarded.http.get(path).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_with_the_key_everything_is_open(guarded: RunningServer, scheme: str) -> None:
    for path in ("/v1/models", "/v1/models/", "/metrics", "/version", "/load"):
        assert guarded.http.get(path, headers=bearer(KEY, scheme)).status_code == 200
    for path in ("/v1/completions", "/v1/completions/"):
        response = guarded.http.post(
            path, json={"prompt": "a", "max_tokens": 1}, headers=bearer(KEY, scheme)
        )
        assert response.status_code == 200


@pytest.mark.parametrize("key", KEYS)
def test_each_of_several_keys_opens(guarded: RunningServer, key: str) -> None:
    assert guarded.http.get("/v1/models", headers=bearer(key)).status_code == 200
    assert (
        guarded.http.post("/tokenize", json={"prompt": "a"}, headers=bearer(key)).status_code == 200
    )
    read_error(guarded.http.post("/tokenize", json={"prompt": "a"}), 401)


def test_stored_responses_are_those_of_the_key(guarded: RunningServer) -> None:
    body = {"input": "a", "max_output_tokens": 1}
    created = guarded.http.post("/v1/responses", json=body, headers=bearer(KEY)).json()
    path, more = f"/v1/responses/{created['id']}", {**body, "previous_response_id": created["id"]}
    read_error(guarded.http.get(path), 401)
    for method in ("GET", "DELETE"):
        read_error(guarded.http.request(method, path, headers=bearer(KEYS[0])), 404)
    error = read_error(guarded.http.post("/v1/responses", json=more, headers=bearer(KEYS[0])), 400)
    assert error["param"] == "previous_response_id"
    assert guarded.http.get(path, headers=bearer(KEY)).json() == created


def test_every_request_is_compared_with_every_key(
    guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopping at the key that matches would tell by the time it takes which one it was."""
    compared: list[tuple[int, int]] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return given == known

    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=compare))
    for key in (*KEYS, "wrong", "f", "x" * 5000):
        compared.clear()
        guarded.http.get("/version", headers=bearer(key))
        assert len(compared) == len(KEYS)
        assert len({length for pair in compared for length in pair}) == 1, (
            "the time it takes depends on how long a key is"
        )


def test_a_key_that_fills_the_queue_leaves_room_to_another(guarded: RunningServer) -> None:
    digest = hashlib.sha256(KEYS[0].encode()).hexdigest()
    held = guarded.engine.admission.reserve(
        [RequestSize(guarded.max_queued_requests, 1)], client=digest
    )
    try:
        answers = [
            guarded.http.post("/v1/completions", json={"prompt": "a"}, headers=bearer(key))
            for key in KEYS[:2]
        ]
    finally:
        held.release()
    assert [answer.status_code for answer in answers] == [429, 200]
    assert answers[0].headers["retry-after"]


def test_settings_do_not_show_the_keys() -> None:
    assert KEY not in repr(ServerSettings(model_names=("m",), api_keys=KEYS))


def test_the_key_comes_before_the_body(guarded: RunningServer) -> None:
    """Without one, nothing is said about the body, whatever is wrong with it."""
    for wrong in (b'{"prompt": ""}', b"x", b"x" * (LIMIT + 1)):
        error = read_error(guarded.http.post("/v1/completions", content=wrong), 401)
        assert (error["type"], error["param"]) == ("AuthenticationError", None)
        assert "prompt" not in error["message"]
    error = read_error(
        guarded.http.post("/v1/completions", json={"prompt": ""}, headers=bearer(KEY)), 400
    )
    assert (error["type"], error["param"]) == ("BadRequestError", "prompt")


GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "a"},
    "a beam search": {"prompt": "a", "max_tokens": 2, "use_beam_search": True, "n": 2},
}


@pytest.mark.parametrize("name", GENERATING)
def test_the_engine_knows_whose_request_it_runs(
    guarded: RunningServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every endpoint: the key's digest, the same for all requests of the key."""
    engine = guarded.engine.engine
    clients: list[str] = []
    add = engine.scheduler.add

    def note(request: Sequence) -> None:
        clients.append(request.client)
        add(request)

    monkeypatch.setattr(engine.scheduler, "add", note)
    path = name if name.startswith("/") else "/v1/completions"
    for key in (KEY, "first"):
        clients.clear()
        response = guarded.http.post(path, json=GENERATING[name], headers=bearer(key))
        assert response.status_code == 200, response.text
        assert set(clients) == {hashlib.sha256(key.encode()).hexdigest()}


def test_the_official_client_sends_the_key(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model), api_keys=("ascii",)) as running:
        with OpenAI(base_url=f"{running.url}/v1", api_key="ascii", max_retries=0) as client:
            assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices
        with (
            OpenAI(base_url=f"{running.url}/v1", api_key="other", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.completions.create(model=MODEL, prompt="a", max_tokens=1)
