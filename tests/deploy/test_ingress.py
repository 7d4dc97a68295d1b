"""The ingress's own answers, with stand-ins for the replicas. It needs Ray but starts nothing."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install -e '.[ray]'")

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.types import Message, Scope

from nanovllm.deploy import ingress
from nanovllm.deploy.settings import ModelSettings

KEY = {"authorization": "Bearer secret"}
PAGE = "# HELP a b\n# TYPE a gauge\na 1.0\n"


class Handle:
    """A model with two replicas, whose answer is the request."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failure: Exception | None = None
        self.media_type = b"application/json"
        self.is_cut = False
        self.requests: list[Scope] = []
        self.respond = SimpleNamespace(remote=lambda *args, **_: Call(self._answer(*args)))

    def options(self, *, stream: bool) -> "Handle":
        return self

    async def _answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message | bytes, None]:
        self.requests.append(scope)
        if self.failure is not None:
            raise self.failure
        headers = {b"content-type": self.media_type, b"x-model": self.name.encode()}
        headers[b"x-request-id"] = b"a"
        yield {"type": "http.response.start", "status": 200, "headers": [*headers.items()]}
        if self.is_cut:
            yield b"data: 1\n\ndata: "
            raise RayActorError
        yield json.dumps({"data": [self.name]}).encode()

    def broadcast(self, method: str) -> Any:
        async def results_async(**options: object) -> list[tuple[str, str]]:
            if self.failure is not None:
                raise TimeoutError
            return [(f"{self.name}-{index}", PAGE) for index in range(2)]

        return SimpleNamespace(results_async=results_async)


class Call:
    """A call of a replica."""

    def __init__(self, parts: AsyncGenerator[Message | bytes, None]) -> None:
        self._parts = parts

    def __aiter__(self) -> AsyncGenerator[Message | bytes, None]:
        return self._parts

    def cancel(self) -> None:
        pass


class Application:
    """An ingress of the models `one` and `two`; `ask` sends a request to it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.one, self.two = Handle("one"), Handle("two")
        handles: Any = (self.one, self.two)
        models = [
            ModelSettings.model_validate(
                {"model": str(folder), "name": handle.name, "options": options}
            )
            for handle in handles
        ]
        self._app = ingress.Ingress(models, *handles).__serve_build_asgi_app__()

    def ask(self, method: str, path: str, root: str = "", **request: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, root_path=root)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await client.request(method, path, **request)

        return asyncio.run(asyncio.wait_for(send(), 60))


@pytest.fixture
def application(tiny_model: Path) -> Application:
    return Application(tiny_model)


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    file = tmp_path / "keys"
    file.write_text("secret\n", encoding="utf-8")
    return str(file)


@pytest.fixture
def keyed(tiny_model: Path, key_file: str) -> Application:
    return Application(tiny_model, api_key_file=key_file)


def test_requests_go_to_their_model(application: Application) -> None:
    answer = application.ask(
        "POST", "/v1/completions", json={"model": "two", "prompt": [10**30] * 99}
    )
    assert answer.headers["x-model"] == "two"
    assert "x-request-id" not in answer.headers  # Ray Serve's proxy adds it
    assert application.ask("GET", "/v1/models/two").headers["x-model"] == "two"
    assert application.ask("POST", "/metrics").headers["x-model"] == "one"


def test_the_prefix_of_the_application_is_removed(application: Application) -> None:
    for path in ("/books/version", "/books/version/"):
        application.ask("GET", path, root="/books")
    assert [request["path"] for request in application.one.requests] == ["/version"] * 2


def test_an_unknown_model_is_told_with_all_names(application: Application) -> None:
    answer = application.ask("POST", "/v1/completions", json={"model": "three"})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith("not served here; served: one, two")


def test_metrics_have_the_replicas_of_all_models(application: Application) -> None:
    lines = application.ask("GET", "/metrics").text.splitlines()[2:]
    assert lines == [f'a{{replica="{name}"}} 1.0' for name in ("one-0", "one-1", "two-0", "two-1")]


def test_metrics_of_full_replicas_are_the_last_ones(application: Application) -> None:
    before = application.ask("GET", "/metrics").text
    application.two.failure = TimeoutError()
    assert application.ask("GET", "/metrics").text == before


def test_models_are_those_of_all_replicas(application: Application) -> None:
    assert application.ask("GET", "/v1/models").json()["data"] == ["one", "two"]
    assert application.ask("HEAD", "/v1/models").status_code == 200
    assert {request["method"] for request in application.one.requests} == {"GET"}
    application.two.failure = RayActorError()
    assert application.ask("GET", "/v1/models").json()["data"] == ["one"]


@pytest.mark.parametrize(
    ("failure", "status"), [(RayActorError(), 503), (BackPressureError(1, 1), 429)]
)
def test_a_request_that_no_replica_answers_can_be_sent_again(
    application: Application, failure: Exception, status: int
) -> None:
    application.one.failure = application.two.failure = failure
    for path in ("/v1/models", "/version"):
        answer = application.ask("GET", path)
        assert (answer.status_code, answer.headers["retry-after"]) == (status, "1")


def test_a_stream_whose_replica_dies_ends_with_an_error(application: Application) -> None:
    application.one.is_cut, application.one.media_type = True, b"text/event-stream; charset=utf-8"
    answer = application.ask("POST", "/v1/completions", json={"stream": True})
    *_, event, end = answer.text.split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 503
    assert end == ""


@pytest.mark.parametrize(("method", "path"), [("GET", "/metrics"), ("POST", "/v1/completions")])
def test_own_answers_need_an_api_key(keyed: Application, method: str, path: str) -> None:
    body = {"model": "three"}
    assert keyed.ask(method, path, json=body).status_code == 401
    assert keyed.ask(method, path, json=body, headers=KEY).status_code in (200, 404)


def test_own_answers_are_for_this_host_only(application: Application) -> None:
    assert application.ask("GET", "/metrics", headers={"host": "evil.example"}).status_code == 403


def test_a_large_body_is_refused(tiny_model: Path) -> None:
    application = Application(tiny_model, max_body_bytes=1000)
    assert application.ask("POST", "/v1/completions", content=b"x" * 1001).status_code == 413
    assert not application.one.requests


@pytest.mark.parametrize(("counts", "status"), [([1, 2], 200), ([1, 0], 503)])
def test_health_is_that_of_all_models(
    tiny_model: Path,
    key_file: str,
    monkeypatch: pytest.MonkeyPatch,
    counts: list[int],
    status: int,
) -> None:
    monkeypatch.setattr(ingress, "_running_replicas", lambda: counts)
    keyed = Application(tiny_model, api_key_file=key_file)
    for path in ("/health", "/health/", "/ping", "/health?deep=1"):
        assert keyed.ask("GET", path).status_code == status


def test_a_deep_check_fails_without_the_controller(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[list[int]] = [[1, 2]]
    monkeypatch.setattr(ingress, "_running_replicas", answers.pop)
    application = Application(tiny_model)
    paths = ("/health", "/health", "/health?deep=0", "/health?deep=1")
    assert [application.ask("GET", path).status_code for path in paths] == [200, 200, 200, 503]


@pytest.mark.parametrize("body", [b"{" * 200_000, b"x" * 200_000])
def test_a_body_is_not_read_before_the_key_is_checked(
    keyed: Application, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    parsed: list[bytes] = []

    def parse(content: bytes) -> dict[str, Any]:
        parsed.append(content)
        return {}

    monkeypatch.setattr(ingress, "_json_object", parse)
    assert keyed.ask("POST", "/v1/completions", content=body).status_code == 401
    assert not parsed
    assert keyed.ask("POST", "/v1/completions", content=body, headers=KEY).status_code == 200
    assert parsed == [body]


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json"])
def test_public_pages_need_no_key(keyed: Application, path: str) -> None:
    assert keyed.ask("GET", path).status_code == 200


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (401, {"headers": {}}),
        (404, {"json": {"model": "three"}}),
        (413, {"content": b"x" * 1001}),
        (429, {"json": {}}),
        (503, {"json": {}}),
    ],
)
def test_web_pages_can_read_the_errors_of_the_ingress(
    tiny_model: Path, key_file: str, status: int, request_: dict[str, Any]
) -> None:
    origin = {"origin": "https://app.example"}
    options = {"max_body_bytes": 1000, "allowed_origins": "https://app.example"}
    application = Application(tiny_model, api_key_file=key_file, **options)
    application.one.failure = BackPressureError(1, 1) if status == 429 else RayActorError()
    request = {"headers": KEY, **request_}
    request["headers"] = {**request["headers"], **origin}
    answer = application.ask("POST", "/v1/completions", **request)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == origin["origin"]
    assert "retry-after" in answer.headers["access-control-expose-headers"].lower()
    preflight = {**origin, "access-control-request-method": "POST"}
    assert application.ask("OPTIONS", "/v1/completions", headers=preflight).status_code == 200
    foreign = {**preflight, "origin": "https://evil.example"}
    assert application.ask("OPTIONS", "/v1/completions", headers=foreign).status_code == 400
