"""`nanovllm bench serve` against a real server, and against a misbehaving one."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nanovllm.cli.bench.http_client import Server
from nanovllm.cli.bench.serve import Trace, figures_of
from tests.support.bench import bench, refused
from tests.support.checkpoints import write_tiny_model

STATISTICS = [
    f"{statistic}_{name}_ms"
    for name in ("ttft", "tpot", "itl", "e2el")
    for statistic in ("mean", "median", "std", "p99")
]
SERVE_FIELDS = {
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "output_throughput", "total_token_throughput", *STATISTICS,
}  # fmt: skip
KEY = "a-key-for-tests"


def test_figures_of_a_known_trace() -> None:
    traces = [
        Trace(10.0, (10.1, 10.2, 10.5), input_tokens=20, output_tokens=5, cached_tokens=4),
        Trace(10.0, (10.3,), input_tokens=30, output_tokens=1),
        Trace(10.0, error="no"),
    ]
    figures = figures_of(traces, 2.0)
    assert set(figures) == SERVE_FIELDS | {"total_cached_tokens"}
    assert [
        figures[name]
        for name in (
            "completed",
            "failed",
            "total_input_tokens",
            "total_output_tokens",
            "total_cached_tokens",
        )
    ] == [2, 1, 50, 6, 4]
    assert [figures[f"{name}_throughput"] for name in ("request", "output", "total_token")] == [
        1.0,
        3.0,
        28.0,
    ]
    assert figures["mean_ttft_ms"] == pytest.approx(200)
    assert figures["std_ttft_ms"] == pytest.approx(100)
    assert figures["mean_tpot_ms"] == pytest.approx((500 - 100) / 4), (
        "an answer of one token has none"
    )
    assert figures["mean_itl_ms"] == figures["median_itl_ms"] == pytest.approx(200)
    assert figures["p99_itl_ms"] == pytest.approx(100 + 0.99 * 200)
    assert figures["median_e2el_ms"] == pytest.approx(400)


def test_figures_of_nothing_are_none_and_zero() -> None:
    figures = figures_of([Trace(1.0, error="no")], 2.0)
    assert all(figures[name] is None for name in STATISTICS)
    assert (figures["request_throughput"], figures["output_throughput"]) == (0, 0)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", ("127.0.0.1", 8000, False, "")),
        ("http://127.0.0.1:8000/v1/", ("127.0.0.1", 8000, False, "")),
        ("https://host/some/place", ("host", 443, True, "/some/place")),
        ("http://[::1]:80", ("::1", 80, False, "")),
    ],
)
def test_a_server_has_a_url(url: str, expected: tuple[object, ...]) -> None:
    server = Server.at(url, "secret")
    assert (server.host, server.port, server.is_tls, server.path) == expected
    assert "secret" not in repr(server)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host:99999", "http://[::1"]
)
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not the URL of a server"):
        Server.at(url)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `nanovllm serve` with a key, and a tiny model that ends every output."""
    folder = write_tiny_model(
        tmp_path_factory.mktemp("model"), config={"eos_token_id": list(range(267))}
    )
    command = [
        sys.executable,
        "-m",
        "nanovllm.cli.main",
        "serve",
        str(folder),
        "--port",
        "0",
        "--served-model-name",
        "tiny",
        "--api-key",
        KEY,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            matches = (re.search(r"Serving on (http://\S+)", line) for line in process.stdout)
            yield next(match[1] for match in matches if match)
        finally:
            process.terminate()


def test_serve_measures_a_running_server(capsys: pytest.CaptureFixture[str], served: str) -> None:
    work = (
        "--num-prompts 6 --random-input-len 10 --random-output-len 9 --ignore-eos "
        "--max-concurrency 3"
    )
    record = bench(capsys, "serve", "--base-url", served, "--api-key", KEY, work)
    assert set(record) >= SERVE_FIELDS
    assert (record["model"], record["completed"], record["failed"], record["first_error"]) == (
        "tiny",
        6,
        0,
        None,
    )
    assert (
        record["total_input_tokens"],
        record["total_output_tokens"],
        record["total_cached_tokens"],
    ) == (6 * 10, 6 * 9, 0)
    assert record["output_throughput"] * record["duration"] == pytest.approx(6 * 9)
    assert all(record[name] >= 0 for name in STATISTICS if "itl" not in name)
    # An answer that is ready before its first piece is read comes in one piece. It has no itl.
    assert all(record[name] is None or record[name] >= 0 for name in STATISTICS if "itl" in name)
    assert 0 < record["mean_ttft_ms"] <= record["mean_e2el_ms"]
    assert record["mean_tpot_ms"] == pytest.approx(
        (record["mean_e2el_ms"] - record["mean_ttft_ms"]) / 8
    )
    assert record["p99_e2el_ms"] <= 1000 * record["duration"]


def test_arrivals_follow_the_rate_and_the_seed(
    capsys: pytest.CaptureFixture[str], served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_API_KEY", KEY)
    work = "--num-prompts 9 --random-input-len 4 --random-output-len 2 --request-rate 40 --seed 5"
    record = bench(capsys, "serve", "--base-url", f"{served}/v1", work)
    assert (record["request_rate"], record["seed"], record["completed"]) == (40, 5, 9)
    assert record["duration"] > 8 / 40 / 4, "eight gaps of 25 ms on average"
    assert record["total_output_tokens"] == 9, "the first token ends the text"
    assert record["mean_tpot_ms"] is None


def test_default_lengths_are_shortened_and_a_port_names_the_server(
    capsys: pytest.CaptureFixture[str], served: str
) -> None:
    port = served.rpartition(":")[2]
    record = bench(capsys, "serve", "--port", port, "--api-key", KEY, "--num-prompts", 2)
    assert (record["random_input_len"], record["random_output_len"]) == (85, 43)
    assert (record["completed"], record["base_url"]) == (2, served)
    with pytest.raises(SystemExit):
        bench(capsys, "serve", "--port", port, "--base-url", served)
    assert "not allowed with argument --port" in capsys.readouterr().err


def test_an_error_of_all_requests_is_reported_once(
    capsys: pytest.CaptureFixture[str], served: str
) -> None:
    known = ("serve", "--base-url", served, "--api-key", KEY)
    assert "the server has no model 'other'; --model may be tiny" in refused(
        capsys, *known, "--model", "other"
    )
    assert "120 tokens and an output of 9 are 129 together" in refused(
        capsys, *known, "--random-input-len", 120, "--random-output-len", 9
    )
    assert "outside the vocabulary of 0 to 266" in refused(
        capsys, *known, "--vocab", 10**6, "--random-input-len", 20
    )
    assert "answered 401: the API key is missing or wrong" in refused(
        capsys, "serve", "--base-url", served, "--api-key", "other"
    )
    assert "no connection to http://127.0.0.1:9 (" in refused(
        capsys, "serve", "--base-url", "http://127.0.0.1:9"
    )


class _Fake(ThreadingHTTPServer):
    """A server that misbehaves after the first request, and counts concurrent requests."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, trouble: str) -> None:
        super().__init__(("127.0.0.1", 0), _FakeHandler)
        self.trouble = trouble
        self.lock = threading.Lock()
        self.requests = self.under_way = self.most_under_way = 0
        self.over = threading.Event()


class _FakeHandler(BaseHTTPRequestHandler):
    server: _Fake

    # The library chose the parameter's name.
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._answer(
            200,
            json.dumps({"object": "list", "data": [{"id": "fake", "object": "model"}]}).encode(),
        )

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        with self.server.lock:
            trouble = self.server.trouble if self.server.requests else "none"
            self.server.requests += 1
        if trouble == "busy":
            self._answer(429, b'{"error": {"message": "too many requests", "code": 429}}')
            return
        if trouble == "page":
            self._answer(502, b"<h1>bad gateway</h1>")
            return
        if trouble == "hang up":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        piece = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'
        usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 10}}\n\n'
        bodies = {
            "none": [
                b": a comment\r\n\r\n",
                piece[:20],
                piece[20:],
                piece,
                usage,
                b"data: [DONE]\n\n",
            ],
            "no end": [piece, usage],
            "no usage": [piece, b"data: [DONE]\n\n"],
            "error": [
                piece,
                b'data: {"error": {"message": "a step failed"}}\n\n',
                b"data: [DONE]\n\n",
            ],
            "not json": [b"data: {\n\n"],
            "silence": [piece],
        }
        *parts, last = bodies[trouble]
        with self.server.lock:
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        for part in parts:
            self._write(part)
        with self.server.lock:
            self.server.under_way -= 1
        self._write(last)
        if trouble == "silence":
            self.server.over.wait(30)
        self.close_connection = True

    def _write(self, part: bytes) -> None:
        time.sleep(0.01)
        self.wfile.write(part)
        self.wfile.flush()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[_Fake]:
    """A server with the trouble of the test's parameter."""
    with _Fake(request.param) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        yield server
        server.over.set()
        server.shutdown()


def address(fake: _Fake) -> str:
    return f"http://127.0.0.1:{fake.server_port}"


@pytest.mark.parametrize("fake", ["none"], indirect=True)
def test_tokens_are_counted_by_usage_and_not_by_pieces(
    capsys: pytest.CaptureFixture[str], fake: _Fake
) -> None:
    record = bench(
        capsys, "serve", "--base-url", address(fake), "--num-prompts", 5, "--max-concurrency", 2
    )
    assert (record["completed"], record["total_input_tokens"], record["total_output_tokens"]) == (
        5,
        15,
        50,
    )
    assert record["mean_tpot_ms"] == pytest.approx(record["mean_itl_ms"] / 9), (
        "two pieces, ten tokens"
    )
    assert record["mean_itl_ms"] > 1, "the server waits 10 ms"
    assert fake.most_under_way <= 2
    assert fake.requests == 6, "one before the measurement"


@pytest.mark.parametrize(
    ("fake", "error"),
    [
        ("busy", "answered 429: too many requests"),
        ("page", "answered 502: <h1>bad gateway</h1>"),
        ("hang up", "broke off, or does not speak HTTP"),
        ("no end", "ended its stream before [DONE]"),
        ("no usage", "no usage"),
        ("error", "the stream broke off: a step failed"),
        ("not json", "an event that is not JSON"),
        ("silence", "was not complete within 0.3 s"),
    ],
    indirect=["fake"],
)
def test_failed_requests_are_counted_and_never_hang(
    capsys: pytest.CaptureFixture[str], fake: _Fake, error: str
) -> None:
    started_s = time.monotonic()
    record = bench(
        capsys, "serve", "--base-url", address(fake), "--num-prompts", 3, "--timeout-s", 0.3, code=1
    )
    assert time.monotonic() - started_s < 60
    assert (record["completed"], record["failed"]) == (0, 3)
    assert error in record["first_error"]
    assert record["total_output_tokens"] == 0
