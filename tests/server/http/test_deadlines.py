"""Requests that exceed their deadline are aborted."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from nanovllm.engine.chat.template import ChatTemplate
from tests.support.serving import (
    MODEL,
    RunningServer,
    loader,
    read_error,
    read_events,
    run_threads,
    wait_until,
)

TEMPLATE = ChatTemplate(
    "{% for message in messages %}{{ message.content }}{% endfor %}", "the test's"
)
LONG: dict[str, Any] = {"max_tokens": 100, "ignore_eos": True}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": "the", **LONG}),
    "several": ("/v1/completions", {"prompt": ["the", "a"], "n": 2, **LONG}),
    "stream": ("/v1/completions", {"prompt": "the", "stream": True, **LONG}),
    "beams": (
        "/v1/completions",
        {"prompt": "the", "use_beam_search": True, "n": 2, "max_tokens": 100, "ignore_eos": True},
    ),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}], **LONG}),
    "chat stream": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "the"}], "stream": True, **LONG},
    ),
    "embedding": ("/v1/embeddings", {"input": [[first] * 100 for first in range(1, 11)]}),
}


@pytest.fixture(scope="module")
def slow(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A slow server: it reads a few prompt tokens at a time, so that an answer takes seconds."""
    with RunningServer(
        loader(tiny_model, step_s=0.05, max_num_seqs=16, max_num_batched_tokens=20),
        chat_template=TEMPLATE,
    ) as running:
        yield running


def ask(running: RunningServer, route: str, timeout_s: str) -> httpx.Response:
    path, body = ROUTES[route]
    return httpx.post(
        running.url + path, json=body, headers={"x-request-timeout-s": timeout_s}, timeout=30
    )


def timeouts(running: RunningServer) -> tuple[float, float]:
    now = running.samples()
    return now["request_timeout_total{stage=queued}"], now["request_timeout_total{stage=running}"]


def test_every_route_that_uses_the_engine_keeps_the_time(slow: RunningServer) -> None:
    before = timeouts(slow)
    generating = [route for route in ROUTES if route != "embedding"]
    responses = dict(
        zip(
            generating,
            run_threads([partial(ask, slow, route, "2") for route in generating]),
            strict=True,
        )
    )
    responses["embedding"] = ask(slow, "embedding", "1.2")
    for route, response in responses.items():
        if "stream" in route:
            error = read_events(response.content)[-1]["error"]
        else:
            error = read_error(response, 504)
            assert response.headers["x-should-retry"] == "false"
        assert (error["code"], error["type"]) == (504, "TimeoutError")
        assert f"was given {1.2 if route == 'embedding' else 2} s" in error["message"]
        assert (
            "it was being worked on" if route == "embedding" else "of its answer came in time"
        ) in error["message"] or route == "beams"
    wait_until(slow.is_idle)
    assert timeouts(slow) == (before[0], before[1] + len(ROUTES))
    assert slow.http.get("/load").json()["queued_tokens"] == 0
    assert slow.complete("the", max_tokens=1)["choices"]


def test_a_request_in_time_is_answered(slow: RunningServer) -> None:
    response = slow.post({"prompt": "the", "max_tokens": 2}, **{"x-request-timeout-s": "30"})
    assert response.status_code == 200


@pytest.fixture
def one_slot(tiny_model: Path) -> Iterator[RunningServer]:
    """A server that does one thing at a time, which takes 20 s; now it does."""
    body = {"prompt": "the", "stream": True, **LONG}
    with (
        RunningServer(loader(tiny_model, step_s=0.2, max_num_seqs=1)) as running,
        running.http.stream("POST", "/v1/completions", json=body) as held,
    ):
        chunks = held.iter_raw()
        next(chunks)
        yield running


def test_a_waiting_request_past_its_deadline_never_begins(one_slot: RunningServer) -> None:
    body = {"prompt": [1] * 50, "n": 2, "max_tokens": 5}
    before = one_slot.samples()["prompt_tokens_computed_total"]
    response = one_slot.post(body, **{"x-request-timeout-s": "0.1"})
    error = read_error(response, 503)
    assert "was given 0.1 s" in error["message"]
    assert "still waiting for its turn" in error["message"]
    assert 1 <= int(response.headers["retry-after"]) <= 60
    events = read_events(
        one_slot.post({**body, "stream": True}, **{"x-request-timeout-s": "0.3"}).content
    )
    assert [event["error"]["code"] for event in events] == [503]
    wait_until(lambda: one_slot.samples()["num_requests_waiting"] == 0)
    now = one_slot.samples()
    assert (now["prompt_tokens_computed_total"], now["num_requests_running"]) == (before, 1)
    assert timeouts(one_slot) == (2, 0)


def test_the_official_client_does_not_retry_a_timed_out_request(slow: RunningServer) -> None:
    before = timeouts(slow)
    with (
        OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=3) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(
            model=MODEL, prompt="the", max_tokens=100, extra_headers={"x-request-timeout-s": "0.5"}
        )
    assert caught.value.status_code == 504
    assert sum(timeouts(slow)) == sum(before) + 1


def test_of_the_servers_time_and_the_clients_the_shorter_counts(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model, step_s=0.05), request_timeout_s=0.4) as running:
        body = {"prompt": "the", **LONG}
        for given, told in (
            ({}, "0.4 s"),
            ({"x-request-timeout-s": "1000"}, "0.4 s"),
            ({"x-request-timeout-s": "0.25"}, "0.25 s"),
        ):
            response = running.post(body, **given)
            assert response.status_code in (503, 504)
            assert f"was given {told}" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "value",
    [
        "0",
        "0.0",
        "-1",
        "1e3",
        "nan",
        "inf",
        "",
        "soon",
        "86401",
        "1234567",
        "1,2",
        "\u0663".encode().decode("latin-1"),
    ],
)
def test_a_time_that_is_none_is_refused(server: RunningServer, value: str) -> None:
    for route, (path, body) in ROUTES.items():
        if "chat" not in route:
            response = server.http.post(
                path, json=body, headers=[(b"x-request-timeout-s", value.encode("latin-1"))]
            )
            error = read_error(response, 400)
            assert error["param"] == "x-request-timeout-s"
            assert "number of seconds above 0 and up to 86400" in error["message"]


def test_two_times_are_none(server: RunningServer) -> None:
    headers = [("x-request-timeout-s", "10"), ("x-request-timeout-s", "20")]
    error = read_error(
        server.http.post("/v1/completions", json={"prompt": "the"}, headers=headers), 400
    )
    assert error["param"] == "x-request-timeout-s"


def test_time_that_passes_before_the_queue_counts_too(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here while the prompt is tokenised: nothing is queued any more."""
    may_go_on = threading.Event()
    inner = server.engine.engine.input_processor
    process = inner.process
    monkeypatch.setattr(inner, "process", lambda request: may_go_on.wait(0.3) or process(request))
    before = server.samples()["prompt_tokens_computed_total"]
    read_error(server.post({"prompt": "the"}, **{"x-request-timeout-s": "0.05"}), 503)
    assert server.samples()["prompt_tokens_computed_total"] == before
