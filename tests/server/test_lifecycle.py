"""The server before its model is loaded, when loading or a step fails, and when it ends."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import SamplingParams
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.errors import CheckpointError, EngineNotReadyError
from tests.support.async_engines import engine_threads
from tests.support.serving import (
    RunningServer,
    loader,
    read_error,
    read_events,
    run_threads,
    wait_until,
)

pytestmark = pytest.mark.both_backends


class LateLoader:
    """Loads a model when it is told to."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        self.may_go_on = threading.Event()
        self._load = load

    def __call__(self) -> Engine:
        """Wait, then load."""
        assert self.may_go_on.wait(30)
        return self._load()


@pytest.fixture
def late(tiny_model: Path) -> Iterator[LateLoader]:
    """A loader that waits, and that does not keep its thread after the test."""
    made = LateLoader(loader(tiny_model))
    yield made
    made.may_go_on.set()


def test_while_the_model_loads_the_server_says_so(late: LateLoader) -> None:
    with RunningServer(late, wait_until_ready=False) as running:
        for response in (
            running.http.get("/health"),
            running.http.get("/v1/models"),
            running.post({"prompt": "a"}),
            running.post({"prompt": ["a", "b"], "stream": True}),
        ):
            error = read_error(response, 503)
            assert error["type"] == "ServiceUnavailableError"
            assert "loading" in error["message"]
            assert int(response.headers["retry-after"]) >= 1
        assert running.http.get("/version").status_code == 200
        assert running.http.get("/openapi.json").status_code == 200
        assert "num_requests_running" not in running.samples()
        running.error({"prompt": ""}, 400)
        running.error({"prompt": "a", "model": "other"}, 404)
        late.may_go_on.set()
        wait_until(lambda: running.http.get("/health").status_code == 200)
        assert running.http.get("/health").json() == {"status": "ready"}
        assert running.complete("a", max_tokens=1)["choices"]


def test_a_server_that_still_loads_ends_at_once(late: LateLoader) -> None:
    before = engine_threads()
    with RunningServer(late, wait_until_ready=False):
        (thread,) = engine_threads() - before
    assert thread.is_alive(), "it waited for the loader, which gives up after 30 s"
    late.may_go_on.set()
    thread.join(10)
    assert not thread.is_alive()


def test_when_loading_fails_requests_are_refused_and_the_server_ends_cleanly() -> None:
    def fail() -> Engine:
        raise CheckpointError("model.safetensors is cut off")

    with RunningServer(fail, wait_until_ready=False) as running:
        wait_until(lambda: "failed" in running.http.get("/health").text)
        read_error(running.http.get("/health"), 503)
        assert "failed" in running.error({"prompt": "a"}, 503)["message"]
        with pytest.raises(CheckpointError, match="cut off"):
            running.on_loop(running.engine.wait_until_ready)


@pytest.fixture
def fresh(tiny_model: Path) -> Iterator[RunningServer]:
    """A server that the test may break."""
    with RunningServer(loader(tiny_model, step_s=0.003, max_num_seqs=3)) as running:
        yield running


def fail_once(running: RunningServer, monkeypatch: pytest.MonkeyPatch, *, at_step: int) -> None:
    """Let the runner raise in one step."""
    runner = running.engine.engine.runner
    run, steps = runner.run, 0

    def failing(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == at_step:
            raise MemoryError("no room for the attention's scores")
        return run(*arguments)

    monkeypatch.setattr(runner, "run", failing)


@pytest.mark.parametrize("at_step", [1, 4])
def test_a_step_that_fails_is_a_500_for_its_requests_only(
    fresh: RunningServer, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    settings: dict[str, Any] = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
    expected = fresh.complete("the", **settings)["choices"]
    fail_once(fresh, monkeypatch, at_step=at_step)
    error = fresh.error({"prompt": ["the", "a"], **settings}, 500)
    assert error["type"] == "InternalServerError"
    assert error["message"] == "a step of the engine failed; the log has the reason"
    assert fresh.complete("the", **settings)["choices"] == expected
    assert fresh.http.get("/health").status_code == 200
    assert fresh.is_idle()
    assert fresh.samples()["request_success_total{finished_reason=error}"] == 2


@pytest.mark.parametrize("at_step", [1, 4])
def test_a_step_that_fails_is_an_event_in_a_stream(
    fresh: RunningServer, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    fail_once(fresh, monkeypatch, at_step=at_step)
    body = {
        "prompt": "the",
        "n": 2,
        "stream": True,
        "max_tokens": 10,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    events = read_events(fresh.post(body).content)
    assert events[-1].keys() == {"error"}
    assert events[-1]["error"]["code"] == 500
    assert all(event["choices"] for event in events[:-1])
    assert len(fresh.stream("the", max_tokens=3, ignore_eos=True)) >= 1
    assert fresh.is_idle()


def test_those_that_wait_while_a_step_fails_are_answered(
    fresh: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three run and fail; the others come after them."""
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    expected = fresh.complete("the", **settings)["choices"]
    fail_once(fresh, monkeypatch, at_step=15)
    responses = run_threads([lambda: fresh.post({"prompt": "the", **settings})] * 12)
    failed = [response for response in responses if response.status_code == 500]
    assert 1 <= len(failed) <= 3
    assert all(
        response.json()["choices"] == expected for response in responses if response not in failed
    )


def test_many_faults_one_after_the_other_do_not_end_the_engine(
    fresh: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine_threads()
    for _ in range(10):
        with monkeypatch.context() as patch:
            fail_once(fresh, patch, at_step=1)
            fresh.error({"prompt": "the"}, 500)
    assert engine_threads() == before
    assert fresh.complete("the", max_tokens=1)["choices"]


def test_a_network_without_numbers_is_an_error_of_its_requests(
    fresh: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = fresh.engine.engine.runner.backend
    compute = backend.logits
    monkeypatch.setattr(backend, "logits", lambda hidden: compute(hidden) * float("nan"))
    assert "not a number" in fresh.error({"prompt": "the"}, 500)["message"]
    assert (
        read_events(fresh.post({"prompt": "the", "stream": True}).content)[-1]["error"]["code"]
        == 500
    )
    monkeypatch.undo()
    assert fresh.complete("the", max_tokens=1)["choices"]


def test_an_answer_that_cannot_be_put_together_costs_the_others_nothing(
    fresh: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    expected = fresh.complete("the", **settings)["choices"]
    add_update = PromptRequest.add_update

    def failing(self: PromptRequest, update: Any) -> bool:
        if "cmpl-broken" in update.request_id:
            raise LookupError("no such token")
        return add_update(self, update)

    monkeypatch.setattr(PromptRequest, "add_update", failing)
    bodies = [
        {"prompt": "the", "request_id": "broken" if place == 1 else "whole", **settings}
        for place in range(3)
    ]
    broken, *whole = sorted(
        run_threads([lambda body=body: fresh.post(body) for body in bodies]),  # type: ignore[misc]
        key=lambda one: -one.status_code,
    )
    message = read_error(broken, 500)["message"]
    assert message == "the answer could not be put together; the log has the reason"
    assert [response.json()["choices"] for response in whole] == [expected, expected]
    wait_until(fresh.is_idle)


def test_an_engine_that_breaks_down_answers_everybody_and_says_so_from_then_on(
    fresh: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fresh.engine.engine
    schedule, steps = engine.scheduler.schedule, 0

    def failing(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise AssertionError("the books do not balance")
        return schedule(*arguments)

    monkeypatch.setattr(engine.scheduler, "schedule", failing)
    body = {"prompt": "the", "max_tokens": 50, "ignore_eos": True}
    whole, streamed = run_threads(
        [lambda: fresh.post(body), lambda: fresh.post({**body, "stream": True})]
    )
    assert "broken down" in read_error(whole, 500)["message"]
    assert read_events(streamed.content)[-1]["error"]["code"] == 500
    read_error(fresh.http.get("/health"), 503)
    fresh.error(body, 503)
    assert fresh.http.get("/metrics").status_code == 200


def test_an_engine_that_stops_ends_what_it_was_doing(fresh: RunningServer) -> None:
    body = {"prompt": "the", "max_tokens": 120, "ignore_eos": True}

    def stop() -> None:
        wait_until(lambda: fresh.samples()["num_requests_running"] == 2)
        fresh.on_loop(fresh.engine.stop)

    stopping = threading.Thread(target=stop)
    stopping.start()
    whole, streamed = run_threads(
        [lambda: fresh.post(body), lambda: fresh.post({**body, "stream": True})]
    )
    stopping.join()
    assert "stopped" in read_error(whole, 503)["message"]
    events = read_events(streamed.content)
    assert (events[-1]["error"]["code"], events[-1]["error"]["type"]) == (
        503,
        "ServiceUnavailableError",
    )
    assert "stopped" in fresh.error(body, 503)["message"]
    assert "stopped" in read_error(fresh.http.get("/health"), 503)["message"]


def test_a_request_that_is_being_read_while_the_engine_stops_is_refused(
    fresh: RunningServer,
) -> None:
    """The engine can stop after a request was checked and before it is queued."""
    engine = fresh.engine

    async def run() -> None:
        request = GenerationRequest(prompts=["the"], params=SamplingParams(max_tokens=1))
        prepared = engine.prepare(request)
        await engine.stop()
        with pytest.raises(EngineNotReadyError, match="stopped"):
            engine.generate(prepared)

    fresh.on_loop(run)
