"""The log line of each request."""

import io
import json
import logging
import re
import socket
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.server.http.request_log import (
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPTS,
    write_log_to,
)
from tests.support.log_lines import LogLines
from tests.support.serving import RunningServer, loader, read_error, read_events, wait_until

KEY = "do-not-log-me"
BEARER = {"authorization": f"Bearer {KEY}"}
LIMIT = 20_000
TEMPLATE = ChatTemplate(
    "{% for message in messages %}{{ message.content }} {% endfor %}", "the test's"
)
FIELDS = [
    "time",
    "request_id",
    "method",
    "path",
    "status",
    "duration_ms",
    "prompt_tokens",
    "completion_tokens",
    "client_gone",
    "timed_out",
    "answer_id",
]


@pytest.fixture(scope="module")
def logged(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server with a request log. A step takes 5 ms, so that clients can leave before the end."""
    settings: dict[str, Any] = {
        "log_requests": True,
        "api_keys": (KEY,),
        "max_body_bytes": LIMIT,
        "chat_template": TEMPLATE,
    }
    with RunningServer(loader(tiny_model, step_s=0.005), **settings) as running:
        running.http.headers.update(BEARER)
        yield running


def test_a_line_has_the_request_and_its_response(logged: RunningServer, log: LogLines) -> None:
    before = datetime.now(timezone.utc)
    body = {"prompt": ["the", "a cat"], "n": 2, "max_tokens": 5, "ignore_eos": True}
    response = logged.http.post(
        "/v1/completions?x=1", json=body, headers={"x-request-id": "job-1:a_b.C"}
    )
    answer = response.json()
    line = log.about("job-1:a_b.C")
    assert list(line) == FIELDS
    assert (line["method"], line["path"], line["status"], line["client_gone"]) == (
        "POST",
        "/v1/completions",
        200,
        False,
    )
    assert (line["prompt_tokens"], line["completion_tokens"]) == (
        answer["usage"]["prompt_tokens"],
        20,
    )
    assert line["answer_id"] == answer["id"]
    assert 5 * 5 <= line["duration_ms"] < 30_000
    assert (
        before - timedelta(seconds=1)
        <= datetime.fromisoformat(line["time"])
        <= datetime.now(timezone.utc)
    )


CHAT = {
    "messages": [{"role": "user", "content": "the"}],
    "max_tokens": 6,
    "ignore_eos": True,
    "n": 2,
}
OTHERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "chat": ("/v1/chat/completions", CHAT, 12),
    "streamed chat": (
        "/v1/chat/completions",
        {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
        12,
    ),
    "embeddings": ("/v1/embeddings", {"input": ["the", "in the end"]}, 0),
    "beam search": (
        "/v1/completions",
        {
            "prompt": ["the", "a"],
            "use_beam_search": True,
            "n": 2,
            "max_tokens": 4,
            "ignore_eos": True,
        },
        16,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_tokens_of_every_kind_of_answer_are_logged(
    logged: RunningServer, log: LogLines, name: str
) -> None:
    path, body, completion_tokens = OTHERS[name]
    response = logged.http.post(path, json=body)
    answer = read_events(response.content)[-1] if body.get("stream") else response.json()
    line = log.about(response.headers["x-request-id"])
    assert (line["path"], line["status"]) == (path, 200)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (
        answer["usage"]["prompt_tokens"],
        completion_tokens,
    )
    assert answer["usage"].get("completion_tokens", 0) == completion_tokens
    assert line["answer_id"] == answer["id"]


def test_a_stream_is_logged_at_its_end(logged: RunningServer, log: LogLines) -> None:
    body = {"prompt": "the", "max_tokens": 30, "ignore_eos": True, "stream": True}
    with logged.http.stream("POST", "/v1/completions", json=body) as response:
        name = response.headers["x-request-id"]
        chunks = response.iter_raw()
        next(chunks)
        assert not any(name in text for text in log.texts())
        rest = b"".join(chunks)
    assert rest.endswith(b"data: [DONE]\n\n")
    line = log.about(name)
    assert (
        line["status"],
        line["prompt_tokens"],
        line["completion_tokens"],
        line["client_gone"],
    ) == (200, 1, 30, False)
    assert line["duration_ms"] >= 30 * 5
    assert line["answer_id"].encode() in rest


REFUSED: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "a bad field": (400, "POST", "/v1/completions", {"json": {"prompt": "", "n": 0}}),
    "no JSON": (
        400, "POST", "/v1/completions",
        {"content": b"{", "headers": {"content-type": "application/json"}},
    ),
    "a wrong key": (401, "GET", "/version", {"headers": {"authorization": "Bearer no"}}),
    "an unknown path": (404, "GET", "/nope", {}),
    "an unknown model": (404, "POST", "/tokenize", {"json": {"prompt": "a", "model": "x"}}),
    "another method": (405, "DELETE", "/v1/completions", {}),
    "a large body": (413, "POST", "/v1/completions", {"content": b" " * (LIMIT + 1)}),
    "a large body in pieces": (413, "POST", "/v1/completions", {"content": [b" " * LIMIT] * 2}),
    "more than fits": (
        400, "POST", "/v1/completions", {"json": {"prompt": "a", "max_tokens": 500}},
    ),
    "too many at once": (
        400, "POST", "/v1/completions", {"json": {"prompt": ["a"] * 20, "n": 100}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_requests_get_an_id_and_a_line(
    logged: RunningServer, log: LogLines, name: str
) -> None:
    status, method, path, options = REFUSED[name]
    request_id = f"refused-{name.replace(' ', '-')}"
    headers = {**options.get("headers", {}), "x-request-id": request_id}
    response = logged.http.request(method, path, **{**options, "headers": headers})
    read_error(response, status)
    assert response.headers.get_list("x-request-id") == [request_id]
    line = log.about(request_id)
    assert (line["status"], line["client_gone"], line["completion_tokens"]) == (status, False, None)


def test_a_fault_is_named_and_logged_too(
    logged: RunningServer, log: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> bytes:
        raise RuntimeError("planted")

    monkeypatch.setattr(logged.metrics, "render", fail)
    response = httpx.get(
        f"{logged.url}/metrics", headers={**BEARER, "x-request-id": "fault"}
    )  # on a connection of its own, which the server closes
    assert "log has the reason" in read_error(response, 500)["message"]
    assert response.headers["x-request-id"] == "fault"
    assert log.about("fault")["status"] == 500


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_took_too_long_is_logged_as_such(
    logged: RunningServer, log: LogLines, *, stream: bool
) -> None:
    body = {"prompt": "the", "max_tokens": 120, "ignore_eos": True, "stream": stream}
    response = logged.post(body, **{"x-request-timeout-s": "0.2"})
    line = log.about(response.headers["x-request-id"])
    assert (line["timed_out"], line["client_gone"]) == (True, False)
    assert line["status"] == 200 if stream else line["status"] in (503, 504)


def test_neither_prompts_nor_keys_nor_queries_are_logged(
    logged: RunningServer, log: LogLines
) -> None:
    logged.http.post(
        "/v1/completions?token=hidden",
        json={"prompt": "hidden words", "max_tokens": 1},
        headers={"x-request-id": "quiet"},
    )
    logged.http.post(
        "/tokenize", json={"prompt": "hidden words"}, headers={"x-request-id": "quiet-2"}
    )
    assert log.about("quiet").keys() == set(FIELDS)
    assert log.about("quiet-2").keys() == set(FIELDS)
    assert "hidden" not in "".join(log.texts())
    assert KEY not in "".join(log.texts())


@pytest.mark.parametrize("path", ['/a%0ab%0d%0a{"x": 1}', "/%00%1b[31m", "/%e2%80%a8\"'\\", "/%ff"])
def test_no_path_breaks_a_log_line(logged: RunningServer, log: LogLines, path: str) -> None:
    response = logged.http.get(path)
    name = response.headers["x-request-id"]
    assert log.about(name)["status"] == 404
    (text,) = [text for text in log.texts() if name in text]
    assert re.fullmatch(r"[ -~]+", text)


def test_a_long_path_is_cut(logged: RunningServer, log: LogLines) -> None:
    name = logged.http.get("/" + "x" * 5000).headers["x-request-id"]
    assert len(log.about(name)["path"]) == 200


def test_prompts_are_logged_with_log_prompts(tiny_model: Path, log: LogLines) -> None:
    with RunningServer(
        loader(tiny_model), log_requests=True, log_prompts=True, chat_template=TEMPLATE
    ) as running:

        def logged_prompts(prompt: Any, status: int = 200) -> Any:
            response = running.post({"prompt": prompt, "max_tokens": 1})
            assert response.status_code == status
            return log.about(response.headers["x-request-id"])["prompts"]

        assert logged_prompts("the 漢\nend") == ["the 漢\nend"]
        assert logged_prompts(["the", "a"]) == ["the", "a"]
        assert logged_prompts([1, 2]) == [[1, 2]]
        (long,) = logged_prompts("x" * 10_000, 400)
        assert len(long) == MAX_PROMPT_CHARACTERS
        (ids,) = logged_prompts([1] * 10_000, 400)
        assert len(ids) == MAX_PROMPT_CHARACTERS // 2
        assert len(logged_prompts(["a"] * 100)) == MAX_PROMPTS
        for path, body, expected in (
            ("/v1/embeddings", {"input": ["the", "end"]}, ["the", "end"]),
            (
                "/v1/chat/completions",
                {
                    "messages": [
                        {"role": "system", "content": "in"},
                        {"role": "user", "content": "the"},
                    ]
                },
                ["in", "the"],
            ),
        ):
            name = running.http.post(path, json=body).headers["x-request-id"]
            assert log.about(name)["prompts"] == expected
        assert "prompts" not in log.about(running.http.get("/version").headers["x-request-id"])


def test_nothing_is_logged_by_default(server: RunningServer, log: LogLines) -> None:
    name = server.post({"prompt": "the", "max_tokens": 1}).headers["x-request-id"]
    server.http.get("/version")
    assert not any(name in text for text in log.texts())


@pytest.fixture
def request_logger() -> Iterator[logging.Logger]:
    """The log's own logger, put back afterwards."""
    logger = logging.getLogger("nanovllm.requests")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield logger
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_lines_are_written_as_they_are(request_logger: logging.Logger) -> None:
    stream = io.StringIO()
    write_log_to(stream)
    request_logger.info('{"a": "%s"}')
    assert stream.getvalue() == '{"a": "%s"}\n'
    assert not request_logger.propagate


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "embeddings"])
def test_an_early_disconnect_is_logged_with_the_generated_tokens(
    logged: RunningServer, log: LogLines, name: str
) -> None:
    path, body, _ = OTHERS[name]
    longer = {**body, "max_tokens": 100}
    request_id = f"early-{name.replace(' ', '-')}"
    content = json.dumps(longer)
    with socket.create_connection(("127.0.0.1", logged.port), timeout=10) as connection:
        connection.sendall((request_head(request_id, len(content), path) + content).encode())
        wait_until(lambda: logged.samples()["num_requests_running"] > 0)
    line = log.about(request_id)
    assert line["client_gone"]
    assert line["prompt_tokens"] > 0
    assert 0 <= line["completion_tokens"] < 200


def test_a_disconnected_stream_is_logged_with_its_tokens(
    logged: RunningServer, log: LogLines
) -> None:
    body = {"prompt": "the", "max_tokens": 120, "ignore_eos": True, "stream": True}
    with logged.http.stream("POST", "/v1/completions", json=body) as response:
        name = response.headers["x-request-id"]
        next(response.iter_raw())
    line = log.about(name)
    assert (line["status"], line["client_gone"]) == (200, True)
    assert 1 <= line["completion_tokens"] < 120


def request_head(request_id: str, length: int, path: str = "/v1/completions") -> str:
    """The head of a request whose body is to come."""
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Authorization: Bearer {KEY}",
    )
    return "\r\n".join((*lines, f"X-Request-Id: {request_id}", f"Content-Length: {length}", "", ""))


def test_a_client_that_does_not_wait_for_its_answer_is_logged(
    logged: RunningServer, log: LogLines
) -> None:
    content = json.dumps({"prompt": "the", "max_tokens": 120, "ignore_eos": True})
    with socket.create_connection(("127.0.0.1", logged.port), timeout=10) as connection:
        connection.sendall((request_head("gone-1", len(content)) + content).encode())
        wait_until(lambda: logged.samples()["num_requests_running"] == 1)
    line = log.about("gone-1")
    assert (line["status"], line["client_gone"], line["prompt_tokens"]) == (499, True, 1)
    assert line["completion_tokens"] < 120


def test_a_client_that_goes_before_its_body_is_complete_is_logged(
    logged: RunningServer, log: LogLines
) -> None:
    with socket.create_connection(("127.0.0.1", logged.port), timeout=10) as connection:
        connection.sendall((request_head("gone-2", 100) + "{").encode())
        wait_until(lambda: logged.http.get("/health").status_code == 200)
    line = log.about("gone-2")
    assert (line["client_gone"], line["prompt_tokens"], line["completion_tokens"]) == (
        True,
        None,
        None,
    )
