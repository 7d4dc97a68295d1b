"""Work on thread pools as clients see it: bounded, fair, and ended with its client."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.server.openai.endpoint import prepare
from tests.support.serving import (
    TIMEOUT_S,
    RunningServer,
    loader,
    read_error,
    run_threads,
    wait_until,
)

BUDGET_BYTES = 200_000


@pytest.fixture(scope="module")
def small(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server with little memory for log-probabilities."""
    load = loader(tiny_model, step_s=0.01)
    with RunningServer(load, max_logprobs_bytes=BUDGET_BYTES) as running:
        yield running


class Blocked:
    """Holds up every completion where it is checked, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self._go = threading.Event()

        def blocked(*arguments: Any) -> Any:
            self.begun += 1
            self._go.wait(TIMEOUT_S)
            return prepare(*arguments)

        monkeypatch.setattr("nanovllm.server.openai.endpoint.prepare", blocked)

    def let_go(self) -> None:
        """Let all of them go on."""
        self._go.set()


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocked]:
    held = Blocked(monkeypatch)
    yield held
    held.let_go()


def send(server: RunningServer, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(head.encode() + content)
    return connection


def test_queued_work_of_a_disconnected_client_never_begins(
    server: RunningServer, blocked: Blocked
) -> None:
    with send(server, {"prompt": "a"}), send(server, {"prompt": "b"}):
        wait_until(lambda: blocked.begun == 2)  # as many as there are threads
        connected = len(server.unsent_bytes())
        left = [send(server, {"prompt": "a"}) for _ in range(20)]
        wait_until(lambda: len(server.unsent_bytes()) >= 20)
        for connection in left:
            connection.close()
        wait_until(lambda: len(server.unsent_bytes()) <= connected)
        server.http.get("/health")  # by now their requests know it too
        kept = send(server, {"prompt": "a", "max_tokens": 1})
        blocked.let_go()
        with kept:
            assert kept.recv(12) == b"HTTP/1.1 200"
    assert blocked.begun <= 4


def test_a_deadline_holds_while_a_request_waits_to_be_checked(
    server: RunningServer, blocked: Blocked
) -> None:
    before = server.samples()["request_timeout_total{stage=queued}"]
    response = server.post({"prompt": "a"}, **{"x-request-timeout-s": "0.05"})
    read_error(response, 503)
    assert response.headers["retry-after"]
    assert server.samples()["request_timeout_total{stage=queued}"] == before + 1


def test_queued_work_fails_when_the_server_stops(tiny_model: Path, blocked: Blocked) -> None:
    """And the server ends, though a thread is still at it."""
    with RunningServer(loader(tiny_model)) as running:
        found: list[int] = []
        asking = threading.Thread(
            target=lambda: found.append(running.post({"prompt": "a"}).status_code)
        )
        asking.start()
        wait_until(lambda: blocked.begun == 1)
        running.on_loop(running.engine.stop)
        asking.join(TIMEOUT_S)
        assert found == [503]


def test_large_requests_do_not_hold_up_small_ones(server: RunningServer, blocked: Blocked) -> None:
    """They have threads of their own."""
    large = {"prompt": "a", "user": "u", "stop": ["x" * 900] * 16, "bad_words": ["y" * 900] * 40}
    with send(server, large), send(server, large), send(server, large):
        wait_until(lambda: blocked.begun == 2)
        assert server.http.post("/tokenize", json={"prompt": "a"}).status_code == 200


def test_log_probabilities_that_never_fit_are_refused(small: RunningServer) -> None:
    body = {"prompt": [[1] * 100] * 10, "max_tokens": 1, "echo": True, "logprobs": 20}
    error = small.error(body)
    assert error["param"] == "logprobs"
    assert str(BUDGET_BYTES) in error["message"]
    small.complete([[1] * 100], max_tokens=1, echo=True, logprobs=20)


def test_log_probabilities_beyond_free_memory_get_retry_after(small: RunningServer) -> None:
    body = {"prompt": [1] * 20, "max_tokens": 100, "logprobs": 20, "ignore_eos": True}
    before = small.samples()["request_refused_total{limit=memory}"]
    statuses = run_threads([lambda: small.post(body).status_code] * 4)
    assert sorted(set(statuses)) == [200, 429]
    assert small.samples()["request_refused_total{limit=memory}"] > before
    assert small.post(body).status_code == 200, "it was not given back"


@pytest.mark.parametrize("stream", [False, True])
def test_memory_is_given_back_where_the_client_leaves(
    small: RunningServer, *, stream: bool
) -> None:
    body = {"prompt": [1] * 20, "max_tokens": 100, "logprobs": 20, "ignore_eos": True}
    short = {**body, "logit_bias": {"5": 100}, "stop_token_ids": [5]}  # it needs as much memory
    for _ in range(5):
        with send(small, {**body, "stream": stream}):
            wait_until(lambda: small.samples()["num_requests_running"] == 1)
        wait_until(lambda: small.post(short).status_code == 200)


def test_a_large_answer_has_the_json_of_a_small_one(server: RunningServer) -> None:
    """It comes in pieces; those of one choice and of many must be the same."""
    settings: dict[str, Any] = {
        "max_tokens": 3,
        "echo": True,
        "logprobs": 5,
        "prompt_logprobs": 3,
        "temperature": 0,
    }
    prompts = [[(7 * i + j) % 250 for j in range(60)] for i in range(6)]
    response = server.post({"prompt": prompts, **settings})
    assert "content-length" not in response.headers
    whole = response.json()
    alone = [server.complete([prompt], **settings) for prompt in prompts]
    assert [choice["logprobs"] for choice in whole["choices"]] == [
        answer["choices"][0]["logprobs"] for answer in alone
    ]
    assert [choice["prompt_logprobs"] for choice in whole["choices"]] == [
        answer["choices"][0]["prompt_logprobs"] for answer in alone
    ]
    assert whole["usage"]["completion_tokens"] == 18
    assert whole.keys() == alone[0].keys()
