"""The examples for nginx and HAProxy, with the real programs before two servers.

The engines are paused where a test holds requests, so that nothing depends on their speed.
"""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.serve_command import TIMEOUT_S, Serving
from tests.support.serving import run_threads, wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
PROXIES = ("nginx", "haproxy")
missing = [name for name in PROXIES if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)} (Debian's packages)"),
    pytest.mark.slow(15),
]
MAX_QUEUED = 2
GREEDY = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


class Site:
    """Two servers `a` and `b`, and both proxies before them by their ports."""

    def __init__(self, a: Serving, b: Serving, ports: dict[str, int]) -> None:
        self.servers = (a, b)
        self.ports = ports

    def control(self, action: str) -> None:
        """Pause, step or resume both engines."""
        for server in self.servers:
            status, state = server.ask("/v1/engine/control", {"action": action})
            assert (status, state["is_paused"]) == (200, action != "resume")

    def num_queued(self) -> list[int]:
        return [server.ask("/load")[1]["queued_requests"] for server in self.servers]

    def is_idle(self) -> bool:
        return self.num_queued() == [0, 0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Start everything; the engines stay paused without a watcher for as long as a test needs."""
    folder = tmp_path_factory.mktemp("proxies")
    flags = ("--num-threads", "1", "--max-queued-requests", str(MAX_QUEUED))
    with ExitStack() as stack:
        a, b = (
            stack.enter_context(
                Serving("--served-model-name", name, "--drain-delay-s", "600", *flags)
            )
            for name in "ab"
        )
        for server in (a, b):
            events = stack.enter_context(
                closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S))
            )
            events.request("GET", "/v1/engine/events")
            assert events.getresponse().status == 200
        ports = {
            name: stack.enter_context(running(name, folder, (a.port, b.port))) for name in PROXIES
        }
        yield Site(a, b, ports)


@contextmanager
def running(name: str, folder: Path, servers: tuple[int, int]) -> Iterator[int]:
    """Run a proxy by its example, on free ports; the limit for a server is MAX_QUEUED."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    path = DEPLOY / ("nginx/nanovllm.conf" if name == "nginx" else "haproxy/haproxy.cfg")
    text = path.read_text(encoding="utf-8")
    changes = {
        "127.0.0.1:8001": f"127.0.0.1:{servers[0]}",
        "127.0.0.1:8002": f"127.0.0.1:{servers[1]}",
        "listen 8000;": f"listen 127.0.0.1:{port};",
        "bind :8000": f"bind 127.0.0.1:{port}",
        "maxconn 512": f"maxconn {MAX_QUEUED}",
    }
    for old, new in changes.items():
        text = text.replace(old, new)
    assert str(port) in text
    file = folder / path.name
    file.write_text(text, encoding="utf-8")
    if name == "nginx":
        main = folder / "nginx.conf"
        paths = " ".join(
            f"{kind}_temp_path {folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        main.write_text(
            f"daemon off; pid {folder}/pid; error_log {folder}/errors; worker_processes 1;\n"
            f"events {{}}\nhttp {{ access_log off; {paths} include {file}; }}\n",
            encoding="utf-8",
        )
        command = ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(main)]
    else:
        command = ["haproxy", "-db", "-f", str(file)]
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or status(port) == 200)
        assert process.poll() is None, (folder / f"{name}.log").read_text(encoding="utf-8")
        yield port
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def ask(port: int, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a response."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as connection:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", **headers}
        connection.request("POST" if content else "GET", path, content, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")


def status(port: int) -> int | None:
    try:
        return ask(port, "/v1/models")[0]
    except OSError:
        return None


def name_of_server(port: int) -> str:
    """Which server answers: its name of the model."""
    code, models = ask(port, "/v1/models")
    assert code == 200, models
    return str(models["data"][0]["id"])


class Stream:
    """A streamed completion of a known number of tokens, of which nothing has been read yet."""

    def __init__(self, port: int, num_tokens: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        body = {**GREEDY, "stream": True, "max_tokens": num_tokens, "return_token_ids": True}
        self._connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        self._response: http.client.HTTPResponse | None = None

    def next_event(self) -> bytes:
        """Wait for an event and return its data."""
        self._response = self._response or self._connection.getresponse()
        assert self._response.status == 200
        while not (line := self._response.readline()).startswith(b"data: "):
            assert line, "the stream has ended"
        return line.removeprefix(b"data: ").strip()

    def read_tokens(self) -> list[int]:
        """Return the tokens of the rest."""
        tokens: list[int] = []
        while (event := self.next_event()) != b"[DONE]":
            for choice in json.loads(event)["choices"]:
                tokens += choice["token_ids"] or ()
        self._connection.close()
        return tokens


def open_streams(site: Site, port: int, num_tokens: int) -> list[Stream]:
    """Open a stream on each of the servers, which are paused."""
    before = site.num_queued()
    streams = []
    for number in (1, 2):
        streams.append(Stream(port, num_tokens))
        wait_until(lambda: sum(site.num_queued()) == sum(before) + number)  # noqa: B023
    assert site.num_queued() == [count + 1 for count in before], "both are on one server"
    return streams


@pytest.mark.parametrize("proxy", PROXIES)
def test_each_token_arrives_at_once(site: Site, proxy: str) -> None:
    site.control("pause")
    streams = open_streams(site, site.ports[proxy], 4)
    for _ in range(3):
        site.control("step")
        for stream in streams:
            (choice,) = json.loads(stream.next_event())["choices"]
            assert len(choice["token_ids"]) == 1
    site.control("resume")
    for stream in streams:
        assert len(stream.read_tokens()) == 1
    wait_until(site.is_idle)


def test_nginx_asks_the_other_server_after_a_429(site: Site) -> None:
    a, b = site.servers
    site.control("pause")
    full = [Stream(a.port, 1) for _ in range(MAX_QUEUED)]
    wait_until(lambda: site.num_queued() == [MAX_QUEUED, 0])
    assert b.ask("/v1/engine/control", {"action": "resume"})[0] == 200
    assert ask(a.port, "/v1/completions", GREEDY)[0] == 429
    for _ in range(4):  # nginx begins with each server in turn
        code, answer = ask(site.ports["nginx"], "/v1/completions", {**GREEDY, "max_tokens": 2})
        assert (code, answer["model"]) == (200, "b")
    site.control("pause")
    full += [Stream(b.port, 1) for _ in range(MAX_QUEUED)]
    wait_until(lambda: site.num_queued() == [MAX_QUEUED, MAX_QUEUED])
    for _ in range(6):  # neither server counts as lost
        code, answer = ask(site.ports["nginx"], "/v1/completions", GREEDY)
        assert (code, answer["error"]["code"]) == (429, 429)
    site.control("resume")
    for stream in full:
        assert len(stream.read_tokens()) == 1
    wait_until(site.is_idle)


def test_haproxy_queues_what_would_be_a_429(site: Site) -> None:
    site.control("pause")

    def complete() -> tuple[int, Any]:
        return ask(site.ports["haproxy"], "/v1/completions", {**GREEDY, "max_tokens": 2})

    def resume() -> tuple[int, Any]:
        wait_until(lambda: site.num_queued() == [MAX_QUEUED, MAX_QUEUED])
        site.control("resume")
        return 200, {"choices": []}

    answers = run_threads([*[complete] * 4 * MAX_QUEUED, resume])
    assert [code for code, _ in answers] == [200] * len(answers), answers
    wait_until(site.is_idle)


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_client_cannot_choose_its_address(site: Site, proxy: str) -> None:
    """The address that counts is the connection's, which is the proxy's; metrics stay inside."""
    forged = {"X-Forwarded-For": "198.51.100.7", "Forwarded": "for=198.51.100.8"}
    assert ask(site.ports[proxy], "/v1/models", **forged)[0] == 200
    with closing(
        http.client.HTTPConnection("127.0.0.1", site.ports[proxy], timeout=TIMEOUT_S)
    ) as connection:
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 404


def test_a_server_that_drains_gets_no_new_requests_and_finishes_its_streams(site: Site) -> None:
    """HAProxy sees /health, nginx that the server accepts no more connections."""
    a, b = site.servers
    site.control("pause")
    streams = [stream for name in PROXIES for stream in open_streams(site, site.ports[name], 20)]
    a.process.send_signal(signal.SIGTERM)
    wait_until(lambda: {name_of_server(site.ports["haproxy"]) for _ in range(4)} == {"b"})
    assert ask(a.port, "/v1/models")[0] == 200, "it serves until the delay is over"
    code, errors = a.end(signal.SIGTERM)  # which resumes its engine, too
    assert code == 0, errors
    for proxy in PROXIES:
        assert {name_of_server(site.ports[proxy]) for _ in range(8)} == {"b"}
    assert b.ask("/v1/engine/control", {"action": "resume"})[0] == 200
    assert [len(stream.read_tokens()) for stream in streams] == [20] * 4
    for proxy in PROXIES:
        code, answer = ask(site.ports[proxy], "/v1/completions", {**GREEDY, "max_tokens": 2})
        assert (code, answer["model"]) == (200, "b")
    printed = a.printed()
    assert re.search(r'127\.0\.0\.1:\d+ - "GET /v1/models', printed)
    assert "198.51.100" not in printed + errors
