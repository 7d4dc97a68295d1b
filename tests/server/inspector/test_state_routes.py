"""The engine's state over HTTP: right, bounded, private, and no way to hang a server."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nanovllm.engine.inspection.inspector import MAX_PAUSE_S, MAX_WATCHERS
from tests.support.engine_state import (
    EVENTS,
    LONG,
    SECRET,
    STATE,
    STEPS,
    VOCABULARY,
    control,
    state,
)
from tests.support.serving import RunningServer, read_error, wait_until


@contextlib.contextmanager
def paused(server: RunningServer) -> Iterator[None]:
    """Pause the engine; resume it in the end and wait until it is idle."""
    assert control(server, "pause")["is_paused"] is True
    try:
        yield
    finally:
        assert control(server, "resume")["is_paused"] is False
        wait_until(server.is_idle)


@contextlib.contextmanager
def requests(server: RunningServer, *bodies: dict[str, Any]) -> Iterator[list[Any]]:
    """Send requests to a paused engine, wait until all are queued, and yield their futures."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        num_queued = 0
        answers = []
        for body in bodies:
            answers.append(pool.submit(server.complete, **{"prompt": "the", **LONG, **body}))
            num_queued += body.get("n", 1)
            wait_until(lambda: len(state(server)["requests"]) == num_queued)  # noqa: B023
        yield answers
        control(server, "resume")
        for answer in answers:
            answer.result()


@contextlib.contextmanager
def events(server: RunningServer, query: str = "") -> Iterator[http.client.HTTPResponse]:
    """Open the stream of events."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("GET", EVENTS + query)
        yield connection.getresponse()
    finally:
        connection.close()


def next_event(response: http.client.HTTPResponse) -> dict[str, Any]:
    """Return the data of the next event."""
    while not (line := response.readline()).startswith(b"data: "):
        assert line, "the stream has ended"
    event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    return event


def test_the_state_equals_the_metrics_and_explains_every_wait(controlled: RunningServer) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": [5] * 40, "n": 2}, {"prompt": [5] * 40}]
    bodies += [{"prompt": [7] * 20}] * 4
    with paused(controlled), requests(controlled, *bodies):
        for _ in range(12):
            control(controlled, "step")
        found, metrics = state(controlled), controlled.samples()
        rows, blocks = found["requests"], found["blocks"]
        running = [row for row in rows if row["state"] == "running"]
        waiting = [row for row in rows if row["state"] == "waiting"]
        assert rows == [*running, *waiting]
        assert (len(running), len(waiting)) == (4, 3)
        assert len(running) == metrics["num_requests_running"]
        assert len(waiting) == metrics["num_requests_waiting"]
        assert blocks["used"] / blocks["total"] == pytest.approx(metrics["kv_cache_usage_perc"])
        assert blocks["used"] + blocks["cached"] + blocks["free"] == blocks["total"] == 24
        assert blocks["shared"] > 0
        values = [value for value, length in blocks["cells"] for _ in range(length)]
        assert len(values) == blocks["total"]
        for index, row in enumerate(rows):
            is_shared_too = row["num_blocks"] - values.count(2 + index)
            assert 0 <= is_shared_too <= blocks["shared"]
        assert [row["reason"] for row in running] == [None] * 4
        slots = "waits for a slot, all 4 slots are running (max_num_seqs 4)"
        reasons = [row["reason"] for row in waiting]
        assert reasons[0] == slots
        assert reasons[1:] == [
            f"1 request is ahead; {waiting[0]['id']} {slots}",
            f"2 requests are ahead; the first of them, {waiting[0]['id']}, {slots}",
        ]
        totals = found["totals"]
        assert totals["generation_tokens"] == metrics["generation_tokens_total"]
        assert totals["prefix_cache_hits"] == metrics["prefix_cache_hits_total"]
        assert sum(found["ttft_s"]["counts"]) == metrics["time_to_first_token_seconds_count"]
        assert sum(found["itl_s"]["counts"]) == metrics["inter_token_latency_seconds_count"]
        assert len(found["itl_s"]["counts"]) == len(found["itl_s"]["bounds"]) + 1
        assert found["last_step"]["step"] == found["step"]
    assert controlled.samples()["num_requests_waiting"] == 0


def test_a_paused_engine_runs_one_step_for_each_command(controlled: RunningServer) -> None:
    with paused(controlled), requests(controlled, {"prompt": [9] * 30}):
        before = state(controlled)
        assert before["is_paused"]
        reason = before["requests"][0]["reason"]
        assert reason == "waits for the next step, but the engine is paused"
        assert 0 < before["pause_left_s"] <= MAX_PAUSE_S
        first = control(controlled, "step")
        assert first == {"is_paused": True, "step": before["step"] + 1}
        row = state(controlled)["requests"][0]
        assert (row["phase"], row["computed_tokens"], row["output_tokens"]) == ("decode", 30, 1)
        control(controlled, "step")
        after = state(controlled)
        assert after["step"] == before["step"] + 2
        assert after["requests"][0]["output_tokens"] == 2
        assert controlled.http.get("/health").status_code == 200
        steps = controlled.http.get(STEPS, params={"last": 2}).json()["steps"]
        assert [step["step"] for step in steps] == [first["step"], first["step"] + 1]
        assert [step["sequences"][0]["kind"] for step in steps] == ["prefill", "decode"]
        assert steps[0]["admitted"] == [row["id"]]
        assert steps[0]["num_prompt_tokens"] == 30
        assert steps[1]["num_decode_tokens"] == 1


def test_a_preemption_has_its_reason_in_the_state_and_in_its_step(
    controlled: RunningServer,
) -> None:
    long = {"max_tokens": 100, "ignore_eos": True}
    bodies = [{"prompt": [index + 1] * 20, **long} for index in range(4)]
    with paused(controlled), requests(controlled, *bodies):
        for _ in range(100):
            control(controlled, "step")
            found = state(controlled)
            if found["last_step"]["preempted"]:
                break
        (preempted,) = found["last_step"]["preempted"]
        (row,) = (row for row in found["requests"] if row["id"] == preempted["id"])
        assert (row["phase"], row["preemptions"]) == ("preempted", 1)
        began = f"preempted at step {found['step']}: no block was free for "
        assert preempted["reason"].startswith(began)
        assert row["reason"].startswith(f"{preempted['reason']}; now: needs ")
    assert controlled.samples()["num_preemptions_total"] >= 1


def test_events_follow_a_request_to_its_end(controlled: RunningServer) -> None:
    with events(controlled) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first = next_event(response)
        assert (first["requests"], first["steps"], first["steps_omitted"]) == ([], [], 0)
        answer = controlled.complete("the", **LONG)
        tokens = steps = 0
        last = first
        while last["requests"] or not tokens:
            last = next_event(response)
            steps += len(last["steps"]) + last["steps_omitted"]
            tokens = last["totals"]["generation_tokens"] - first["totals"]["generation_tokens"]
            assert len(last["steps"]) <= 16
        assert tokens == answer["usage"]["completion_tokens"] == 60
        assert last["step"] - first["step"] == steps
        assert last["steps"][-1]["finished"][0]["reason"] == "length"
        assert last["rates"]["tokens_per_s"] > 0
        while next_event(response)["rates"]["steps_per_s"] > 0:
            pass  # until the engine is shown as idle


def test_a_stream_may_be_limited_and_head_ends_it(controlled: RunningServer) -> None:
    response = controlled.http.get(EVENTS, params={"frames": 1})
    assert response.content.startswith(b"event: state\ndata: {")
    assert response.content.count(b"\n\n") == 1
    assert controlled.http.head(EVENTS).status_code == 200
    for path in (f"{EVENTS}?frames=0", f"{STEPS}?last=513", f"{STEPS}?last=x", f"{STEPS}?last="):
        error = read_error(controlled.http.get(path), 400)
        assert error["param"] in ("frames", "last")
        assert "must be" in error["message"]


def test_there_are_at_most_16_streams(controlled: RunningServer) -> None:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(events(controlled)) for _ in range(MAX_WATCHERS)]
        assert all("step" in next_event(response) for response in opened)
        error = read_error(controlled.http.get(EVENTS), 429)
        assert "16 streams" in error["message"]
        assert controlled.http.get(STATE).status_code == 200

    def is_accepted() -> bool:
        return controlled.http.get(EVENTS, params={"frames": 1}).status_code == 200

    wait_until(is_accepted)


def test_a_pause_that_is_left_alone_ends(
    controlled: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controlled.engine.inspector, "lease_s", 0.05)
    with events(controlled) as response:
        next_event(response)
        control(controlled, "pause")
        while not next_event(response)["is_paused"]:
            pass
    assert controlled.complete("the", **LONG)["usage"]["completion_tokens"] == 60
    wait_until(lambda: not controlled.engine.inspector.is_paused)
    control(controlled, "pause")
    assert controlled.complete("the", **LONG)["usage"]["completion_tokens"] == 60
    wait_until(lambda: controlled.engine.engine.scheduler.observer is None)


def test_a_watched_pause_ends_after_a_maximum_time_that_steps_do_not_extend(
    controlled: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector = controlled.engine.inspector
    with events(controlled) as response, requests(controlled) as answers:
        next_event(response)
        control(controlled, "pause")
        left_s = state(controlled)["pause_left_s"]
        control(controlled, "step")
        control(controlled, "pause")
        assert state(controlled)["pause_left_s"] < left_s
        control(controlled, "resume")
        assert state(controlled)["pause_left_s"] is None
        monkeypatch.setattr(inspector, "max_pause_s", 0.2)
        control(controlled, "pause")
        answers.append(ThreadPoolExecutor(1).submit(controlled.complete, "the", **LONG))
        answers[-1].result()
        assert not inspector.is_paused
        assert inspector.num_watchers == 1, "the page still watches"


def test_responses_during_a_pause_name_it(controlled: RunningServer) -> None:
    header = "x-nanovllm-engine"
    with paused(controlled):
        for path in ("/v1/models", STATE, "/health", "/nothing"):
            assert controlled.http.get(path).headers[header] == "paused"
        assert controlled.http.get("/health").json() == {"status": "ready"}
    assert header not in controlled.http.get("/v1/models").headers


def test_the_vocabulary_is_spelled_and_cacheable(controlled: RunningServer) -> None:
    response = controlled.http.get(VOCABULARY)
    tokens = response.json()["tokens"]
    ids = {"tokens": list(range(len(tokens))), "return_token_strs": True}
    assert len(tokens) == controlled.http.get("/tokenizer_info").json()["vocab_size"]
    assert tokens == controlled.http.post("/detokenize", json=ids).json()["token_strs"]
    assert response.headers["cache-control"] == "private, no-cache"
    tag = {"if-none-match": response.headers["etag"]}
    unchanged = controlled.http.get(VOCABULARY, headers=tag)
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["etag"] == response.headers["etag"]
    assert controlled.http.get(VOCABULARY, headers={"if-none-match": '"x"'}).status_code == 200
    foreign = {"sec-fetch-site": "cross-site"}
    read_error(controlled.http.get(VOCABULARY, headers=foreign), 403)


def test_a_request_may_be_aborted_and_expire_during_a_pause(controlled: RunningServer) -> None:
    with paused(controlled):
        body = {"prompt": "the", "stream": True, **LONG}
        with controlled.http.stream("POST", "/v1/completions", json=body):
            wait_until(lambda: len(state(controlled)["requests"]) == 1)
            control(controlled, "step")
        wait_until(lambda: state(controlled)["requests"] == [])
        assert state(controlled)["blocks"]["used"] == 0
        error = controlled.error({"prompt": "the"}, 503, **{"x-request-timeout-s": "0.05"})
        assert "0.05 s" in error["message"]
        wait_until(lambda: state(controlled)["requests"] == [])


def test_a_reader_that_stalls_is_disconnected(controlled: RunningServer) -> None:
    """Its first event is larger than what the system and the server take for it."""
    buffer = socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
    before = controlled.listening.getsockopt(*buffer[:2])
    controlled.listening.setsockopt(*buffer)
    ended = threading.Event()
    try:
        with paused(controlled), socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.settimeout(30)
            many = json.dumps({"prompt": ["a", "b", "c"], "n": 120, "stream": True}).encode()
            with socket.create_connection(("127.0.0.1", controlled.port)) as client:
                client.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(many), many)
                )
                wait_until(lambda: state(controlled)["requests_omitted"] == 360 - 256)
                reader.connect(("127.0.0.1", controlled.port))
                reader.sendall(f"GET {EVENTS} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                watchers = controlled.engine.inspector
                wait_until(lambda: watchers.num_watchers == 1)
                wait_until(lambda: watchers.num_watchers == 0)
                ended.set()
    finally:
        controlled.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, before // 2)
    assert ended.is_set()


def test_prompts_are_hidden(controlled: RunningServer) -> None:
    with (
        paused(controlled),
        requests(controlled, {"prompt": SECRET, "n": 2}, {"prompt": SECRET}),
        events(controlled) as response,
    ):
        control(controlled, "step")
        event = next_event(response)
        texts = [controlled.http.get(path).text for path in (STATE, STEPS)] + [json.dumps(event)]
        assert event["shows_prompts"] is False
        assert [row["prompt"] for row in event["requests"]] == [None] * 3
        assert not [text for text in texts if "cat" in text]
