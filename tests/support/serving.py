"""Servers for tests: the real application and engine behind uvicorn on a free port, in a thread."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.config import EngineConfig
from nanovllm.engine.admission import MAX_LOGPROBS_BYTES
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.engine import Engine
from nanovllm.model.backend import Backend
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.sampling import SamplingSettings
from nanovllm.runner.logit_rows import LogitRows
from nanovllm.runner.native_model_runner import NativeModelRunner, RunnerOutput
from nanovllm.server.app import create_app
from nanovllm.server.http.protocol import watched_protocol
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.service import ServerControl, ServerSettings

T = TypeVar("T")
MODEL = "tiny"
TIMEOUT_S = 30.0
START_TIMEOUT_S = (
    180.0  # where the kernels were never compiled before, on a machine that has other work
)

ENGINE_SETTINGS: dict[str, Any] = {
    "kv_cache_memory": "16MiB",
    "batch_invariant": True,
    "block_size": 16,
    "num_threads": 1,
}
"""Settings for a tiny model. The fixture `backend` adds one.

`batch_invariant` makes an answer have the same bits alone and beside others.
"""


class SlowRunner(NativeModelRunner):
    """Takes its time for a step, as a large model does, so that a test can do things meanwhile."""

    def __init__(self, backend: Backend, step_s: float) -> None:
        super().__init__(backend)
        self.step_s = step_s
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def run(self, batch: ForwardBatch, rows: LogitRows, settings: SamplingSettings) -> RunnerOutput:
        """One step, not before `step_s` are over and `may_go_on` is set."""
        time.sleep(self.step_s)
        assert self.may_go_on.wait(2 * TIMEOUT_S)
        return super().run(batch, rows, settings)


def loader(folder: Path, *, step_s: float = 0.0, **changes: Any) -> Callable[[], Engine]:
    """What AsyncEngine takes: loads the model with ENGINE_SETTINGS and these changes."""
    config = EngineConfig(**{**ENGINE_SETTINGS, **changes})

    def load() -> Engine:
        engine = Engine.load(folder, config)
        if step_s:
            engine.runner = SlowRunner(engine.runner.backend, step_s)
        return engine

    return load


class RunningServer:
    """A server in a thread, as a context manager. Use `on_loop` to call into the application."""

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        max_queued_requests: int = 1024,
        max_queued_tokens: int | None = None,
        max_logprobs_bytes: int = MAX_LOGPROBS_BYTES,
        max_connections: int | None = None,
        wait_until_ready: bool = True,
        **settings: Any,
    ) -> None:
        self.metrics = ServerMetrics(MODEL)
        self.settings = ServerSettings(**{"model_names": (MODEL, "alias"), **settings})
        self._load = load
        self.max_queued_requests = max_queued_requests
        self._max_queued_tokens = max_queued_tokens
        self._max_logprobs_bytes = max_logprobs_bytes
        self._max_connections = max_connections
        self._wait_until_ready = wait_until_ready
        self._thread = threading.Thread(target=self._run, name="test-server")
        self._started = threading.Event()
        self.http: httpx.Client

    def __enter__(self) -> "RunningServer":
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)
        kept_s = min(
            2.0, self.settings.stalled_client_s / 2
        )  # a connection that the server is about to end must not be used again
        self.http = httpx.Client(
            base_url=self.url, timeout=TIMEOUT_S, limits=httpx.Limits(keepalive_expiry=kept_s)
        )
        try:
            if self._wait_until_ready:
                self.on_loop(self.engine.wait_until_ready, START_TIMEOUT_S)
        except BaseException:
            self.__exit__()  # else its thread would keep the tests from ending
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._loop.call_soon_threadsafe(self._server.ending.set)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """The port that the system gave it."""
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    @property
    def listening(self) -> socket.socket:
        """Its listening socket, whose options new connections take over."""
        return self._server.servers[0].sockets[0]

    def unsent_bytes(self) -> dict[int, int]:
        """Return how many bytes each client has yet to read, by a number for its connection."""

        async def look() -> dict[int, int]:
            return {
                id(connection): connection.transport.get_write_buffer_size()
                for connection in self._server.server_state.connections
            }

        return self.on_loop(look)

    def on_loop(self, function: Callable[[], Awaitable[T]], timeout_s: float = TIMEOUT_S) -> T:
        """Run a coroutine on the server's event loop and wait for its result."""

        async def call() -> T:
            return await function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(timeout_s)

    def complete(self, prompt: Any = "the", **body: Any) -> dict[str, Any]:
        """The answer to a request that must succeed."""
        response = self.post({"prompt": prompt, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def post(self, body: Any, **headers: str) -> httpx.Response:
        """POST /v1/completions; `body` is JSON, or bytes to be sent as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(
            "/v1/completions",
            content=content,
            headers={"content-type": "application/json", **headers},
        )

    def stream(self, prompt: Any = "the", **body: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer before [DONE], which must be the last."""
        response = self.post({"prompt": prompt, "stream": True, **body})
        assert response.status_code == 200, response.text
        return read_events(response.content)

    def error(self, body: Any, status: int = 400, **headers: str) -> dict[str, Any]:
        """The error object of a request that must be refused with this status."""
        return read_error(self.post(body, **headers), status)

    def samples(self) -> dict[str, float]:
        """Return /metrics by name without the prefix, followed by labels other than model_name."""
        return read_metrics(self.http.get("/metrics").text)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no step end meanwhile; the engine is that of a `loader` with `step_s`."""
        runner = self.engine.engine.runner
        assert isinstance(runner, SlowRunner)
        runner.may_go_on.clear()
        try:
            yield
        finally:
            runner.may_go_on.set()

    def is_idle(self) -> bool:
        """Whether no request runs or waits and no block of the cache is in use."""
        now = self.samples()
        return not any(
            now[name]
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        )

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        limits = {
            "max_queued_requests": self.max_queued_requests,
            "max_queued_tokens": self._max_queued_tokens,
            "max_logprobs_bytes": self._max_logprobs_bytes,
        }
        self.engine = AsyncEngine(self._load, **limits, on_step=self.metrics.on_step)  # type: ignore[arg-type]
        self.control = ServerControl(self.engine, self.settings.api_keys)
        self.app = create_app(self.engine, self.settings, self.metrics, self.control)
        config = uvicorn.Config(
            self.app,
            port=0,
            log_config=None,
            lifespan="on",
            ws="none",
            http=watched_protocol(self.settings.stalled_client_s, self._max_connections),
            timeout_graceful_shutdown=5,
        )
        self._server = _ServerInThread(config, self._started)
        await self._server.serve()


class _ServerInThread(uvicorn.Server):
    """Says when it has started, and ends at once when told to. Uvicorn polls ten times a second."""

    def __init__(self, config: uvicorn.Config, has_started: threading.Event) -> None:
        super().__init__(config)
        self.ending = asyncio.Event()
        self._has_started = has_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._has_started.set()

    async def main_loop(self) -> None:
        await self.ending.wait()


@dataclass(frozen=True)
class Answer:
    """A streamed choice put together again."""

    text: str
    logprobs: dict[str, list[Any]] | None
    finish_reason: str | None
    stop_reason: str | int | None


def read_events(content: bytes) -> list[dict[str, Any]]:
    """The JSON of every server-sent event; the last must be [DONE]. Blank lines are skipped."""
    *parts, rest = content.split(b"\n\n")
    assert rest == b""
    events = [part for part in parts if part]
    assert all(event.startswith(b"data: ") for event in events)
    assert events[-1] == b"data: [DONE]"
    return [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]


def join_choices(events: list[dict[str, Any]]) -> dict[int, Answer]:
    """The answers that the chunks of a stream add up to, by index."""
    answers: dict[int, Answer] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        before = answers.get(choice["index"], Answer("", None, None, None))
        assert before.finish_reason is None, "a chunk came after the last of its choice"
        logprobs = before.logprobs
        if choice["logprobs"] is not None:
            logprobs = {
                name: (logprobs or {}).get(name, []) + part
                for name, part in choice["logprobs"].items()
            }
        answers[choice["index"]] = Answer(
            before.text + choice["text"], logprobs, choice["finish_reason"], choice["stop_reason"]
        )
    return answers


def whole_choices(body: dict[str, Any]) -> dict[int, Answer]:
    """The answers of a response that was not streamed, in the form of `join_choices`."""
    return join_choices([body])


def read_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return a response's error after checks of its status, its form and the request's id."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    return error


def read_metrics(text: str) -> dict[str, float]:
    """Samples of a Prometheus page by name; every one of the engine must be of this model."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if not sample.name.startswith(("http_requests_", "process_")):
                assert labels.pop("model_name") == MODEL
                assert sample.name.startswith("nanovllm:")
            suffix = "".join(f"{{{name}={value}}}" for name, value in labels.items())
            samples[sample.name.removeprefix("nanovllm:") + suffix] = float(sample.value)
    return samples


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait until `condition` holds; fails when it does not come true in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.01)


def run_threads(functions: list[Callable[[], T]]) -> list[T]:
    """Call all at once, each in its own thread. Return the results in order, or raise an error."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(functions))

    def call(place: int, function: Callable[[], T]) -> None:
        try:
            barrier.wait(TIMEOUT_S)
            results[place] = function()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [
        threading.Thread(target=call, args=(place, function))
        for place, function in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S * 2)
    for error in errors:
        raise error
    return [results[place] for place in range(len(functions))]
