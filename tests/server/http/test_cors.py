"""CORS: the pages of which origins may use the server."""

from pathlib import Path

import httpx
import pytest

from tests.support.guarded import KEY, LIMIT, PAGE, bearer
from tests.support.serving import RunningServer, loader, read_error


def preflight(
    server: RunningServer, origin: str, path: str = "/v1/completions", method: str = "POST"
) -> httpx.Response:
    """What a browser asks before it lets a page send JSON with a key."""
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type",
    }
    return server.http.options(path, headers=headers)


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
@pytest.mark.parametrize(
    ("path", "method"),
    [("/v1/completions", "POST"), ("/v1/models", "GET"), ("/v1/responses/x", "DELETE")],
)
def test_a_browser_may_ask_without_a_key(
    guarded: RunningServer, origin: str, path: str, method: str
) -> None:
    response = preflight(guarded, origin, path, method)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert method in response.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= set(
        response.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
    )
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "origin",
    [
        "https://other.example",
        "http://page.example",
        PAGE + ":8443",
        "null",
        PAGE + ".evil.example",
    ],
)
def test_other_pages_may_not(guarded: RunningServer, origin: str) -> None:
    response = preflight(guarded, origin)
    assert "origin" in read_error(response, 400)["message"]
    assert "access-control-allow-origin" not in response.headers
    answer = guarded.http.get("/version", headers={**bearer(KEY), b"origin": origin.encode()})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_a_preflight_for_another_method_is_refused(guarded: RunningServer) -> None:
    assert "method" in read_error(preflight(guarded, PAGE, method="PUT"), 400)["message"]


def test_pages_may_read_answers_errors_and_streams(
    guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {**bearer(KEY), b"origin": PAGE.encode()}

    def fail() -> bytes:
        raise RuntimeError("planted")

    monkeypatch.setattr(guarded.metrics, "render", fail)
    stream = {"prompt": "a", "max_tokens": 1, "stream": True}
    streamed = guarded.http.post("/v1/completions", json=stream, headers=headers)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    responses = {
        200: guarded.http.get("/version", headers=headers),
        400: guarded.http.post("/v1/completions", json={"prompt": ""}, headers=headers),
        401: guarded.http.get("/version", headers={"origin": PAGE}),
        404: guarded.http.get("/nope", headers=headers),
        413: guarded.http.post("/v1/completions", content=b" " * (LIMIT + 1), headers=headers),
        500: httpx.get(
            f"{guarded.url}/metrics", headers=headers
        ),  # on a connection of its own, which the server closes
    }
    for status, response in [*responses.items(), (200, streamed)]:
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE
        exposed = response.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "x-nanovllm-engine"} <= set(exposed)
        assert response.headers["x-request-id"]


def test_all_pages_may_where_all_are_allowed(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model), allowed_origins=("*",)) as running:
        for response in (
            preflight(running, "null"),
            running.http.get("/version", headers={"origin": "https://any.example"}),
        ):
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in response.headers


def test_no_page_may_where_none_is_named(server: RunningServer) -> None:
    response = preflight(server, PAGE)
    read_error(response, 405)
    answer = server.http.get("/version", headers={"origin": PAGE})
    for headers in (response.headers, answer.headers):
        assert not any(name.startswith("access-control") for name in headers)
