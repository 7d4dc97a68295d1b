"""The queue is bounded in tokens too: refusals, their messages, and how the room is given back."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanovllm.engine.admission import RequestSize
from tests.support.serving import RunningServer, loader, read_error, read_events, wait_until

HELD = {"prompt": [1] * 10, "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def bounded(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server that takes 100 tokens at once, and takes seconds for them."""
    with RunningServer(loader(tiny_model, step_s=0.03), max_queued_tokens=100) as running:
        yield running


def load(running: RunningServer) -> dict[str, int]:
    loads: dict[str, int] = running.http.get("/load").json()
    return loads


def is_free(running: RunningServer) -> bool:
    now = load(running)
    return running.is_idle() and (now["queued_requests"], now["queued_tokens"]) == (0, 0)


def test_a_request_that_would_pass_the_limit_waits_outside(bounded: RunningServer) -> None:
    body = {**HELD, "stream": True}
    with bounded.http.stream("POST", "/v1/completions", json=body) as held:
        chunks = held.iter_raw()
        next(chunks)
        assert load(bounded)["queued_tokens"] == 70
        assert bounded.samples()["queued_tokens"] == 70
        refused = {**HELD, "prompt": [1, 2, 3], "max_tokens": 14, "n": 2}
        for asked in (
            refused,
            {**refused, "stream": True},
            {**refused, "prompt": [[1], [2, 3]], "max_tokens": 7},
        ):
            response = bounded.post(asked)
            assert (
                "unfinished requests may need 70 tokens and 31 more would pass the limit of 100"
                in read_error(response, 429)["message"]
            )
            assert 1 <= int(response.headers["retry-after"]) <= 60
        assert (
            read_error(bounded.http.post("/v1/embeddings", json={"input": [1] * 31}), 429)["type"]
            == "RateLimitError"
        )
        beams = {"prompt": [1], "use_beam_search": True, "n": 3, "max_tokens": 10}
        assert "31 more" in bounded.error(beams, 429)["message"]
        assert bounded.samples()["request_refused_total{limit=tokens}"] == 5
        assert len(bounded.complete(**{**refused, "max_tokens": 13})["choices"]) == 2, (
            "29 of the 30 that are left"
        )
    wait_until(lambda: is_free(bounded))


def test_what_can_never_fit_is_a_wrong_request(bounded: RunningServer) -> None:
    error = bounded.error({"prompt": [1] * 3, "max_tokens": 50, "n": 2})
    assert "may need 103 tokens" in error["message"]
    assert "the limit is 100" in error["message"]
    assert "lower max_tokens" in error["message"]
    assert len(bounded.complete([1] * 2, max_tokens=14, n=7)["choices"]) == 7, (
        "the prompt counts once"
    )


def test_a_beam_search_has_its_room_from_beginning_to_end(bounded: RunningServer) -> None:
    """Its steps are requests of their own, none of which may be refused."""
    body = {
        "prompt": [1] * 4,
        "use_beam_search": True,
        "n": 3,
        "max_tokens": 20,
        "ignore_eos": True,
    }
    answers: list[dict[str, Any]] = []
    search = threading.Thread(target=lambda: answers.append(bounded.complete(**body)))
    search.start()
    wait_until(lambda: load(bounded)["queued_tokens"] == 64)
    bounded.error({"prompt": [1], "max_tokens": 36}, 429)
    search.join()
    assert len(answers[0]["choices"]) == 3
    wait_until(lambda: is_free(bounded))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["answered", "client gone", "fault", "timeout"])
def test_every_end_gives_the_room_back(
    bounded: RunningServer, monkeypatch: pytest.MonkeyPatch, end: str, *, stream: bool
) -> None:
    body = {**HELD, "prompt": [[1] * 5, [2] * 5], "max_tokens": 20, "n": 2, "stream": stream}
    headers = {"x-request-timeout-s": "0.1"} if end == "timeout" else {}
    if end == "answered":
        body["max_tokens"] = 2
    if end == "fault":
        monkeypatch.setattr(
            bounded.engine.engine.runner,
            "run",
            lambda *_: (_ for _ in ()).throw(RuntimeError("fell over")),
        )
    if end == "client gone":
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(base_url=bounded.url, timeout=0.1) as http,
        ):
            http.post("/v1/completions", json={**body, "stream": False})
        if stream:
            with bounded.http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_raw())
    else:
        response = bounded.post(body, **headers)
        # A request that fails before it has begun gets a plain response.
        begun = response.headers["content-type"].startswith("text/event-stream")
        failed = "error" in (read_events(response.content)[-1] if begun else response.json())
        assert failed == (end in ("fault", "timeout"))
    wait_until(lambda: is_free(bounded))
    monkeypatch.undo()
    bounded.engine.admission.reserve([RequestSize(1, 100)]).release()
    assert bounded.complete("the", max_tokens=1)["choices"]
