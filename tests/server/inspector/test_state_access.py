"""Who may read the engine's state and control it, and where the paths exist."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.server.app import create_app
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.service import ServerSettings
from tests.support.async_engines import run
from tests.support.engine_state import CONTROL, EVENTS, LONG, SECRET, STATE, STEPS, state
from tests.support.serving import RunningServer, loader, read_error

KEY = "the-key"


@pytest.fixture(scope="module")
def private(tiny_model: Path) -> Iterator[RunningServer]:
    """A server with a key that shows prompts and has no controls."""
    load = loader(tiny_model)
    with RunningServer(load, inspector_shows_prompts=True, api_keys=(KEY,)) as running:
        yield running


def test_prompts_are_shown_where_the_operator_says_so(private: RunningServer) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    private.http.headers.update(headers)
    with private.http.stream(
        "POST", "/v1/completions", json={"prompt": SECRET * 30, "stream": True, **LONG}
    ):
        rows = state(private)["requests"]
    # the request may have ended before; a prompt that is shown is cut
    assert all(row["prompt"] == (SECRET * 30)[:200] for row in rows)
    error = read_error(private.http.post(CONTROL, json={"action": "pause"}), 403)
    assert "--inspector-controls" in error["message"]
    assert state(private)["can_control"] is False
    for path in (STATE, EVENTS, STEPS):
        read_error(httpx.get(private.url + path), 401)
    read_error(httpx.post(private.url + CONTROL, json={"action": "pause"}), 401)


FOREIGN = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://["},
    {"origin": "http://127.0.0.1:1"},
    {"sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_a_page_of_another_origin_is_refused(
    controlled: RunningServer, headers: dict[str, str]
) -> None:
    for path in (STATE, EVENTS, STEPS):
        error = read_error(controlled.http.get(path, headers=headers), 403)
        assert "--allowed-origins" in error["message"]
    response = controlled.http.post(CONTROL, json={"action": "pause"}, headers=headers)
    read_error(response, 403)
    assert not controlled.engine.inspector.is_paused
    own = {"origin": controlled.url, "sec-fetch-site": "same-origin"}
    assert controlled.http.get(STATE, headers=own).status_code == 200


def test_a_command_must_be_json_and_known(controlled: RunningServer) -> None:
    plain = {"content-type": "text/plain"}
    body = b'{"action": "pause"}'
    read_error(controlled.http.post(CONTROL, content=body, headers=plain), 400)
    for wrong in ({}, {"action": "stop"}, {"action": "pause", "for": 1}):
        read_error(controlled.http.post(CONTROL, json=wrong), 400)
    assert not controlled.engine.inspector.is_paused


def refuse_all(app: ASGIApp, status: int) -> str:
    """Check that every path is refused with this status; return the OpenAPI document."""
    documents = []

    async def test() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for path in (STATE, EVENTS, STEPS):
                read_error(await client.get(path), status)
            read_error(await client.post(CONTROL, json={"action": "pause"}), status)
            documents.append((await client.get("/openapi.json")).text)

    run(test)
    return documents[0]


def test_without_the_inspector_the_paths_do_not_exist(tiny_model: Path) -> None:
    settings = ServerSettings(model_names=("tiny",), has_inspector=False)
    app = create_app(AsyncEngine(loader(tiny_model)), settings, ServerMetrics("tiny"))
    assert "/v1/engine" not in refuse_all(app, 404)


def test_before_the_engine_is_ready_it_is_a_503(tiny_model: Path) -> None:
    settings = ServerSettings(model_names=("tiny",), inspector_controls=True)
    app = create_app(AsyncEngine(loader(tiny_model)), settings, ServerMetrics("tiny"))
    assert "/v1/engine" in refuse_all(app, 503)
