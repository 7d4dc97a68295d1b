"""How `nanovllm serve` ends: signals, streams that go on, and clients that do not read."""

import http.client
import json
import signal
import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.serve_command import TIMEOUT_S, Serving
from tests.support.serving import wait_until


def test_a_signal_ends_it_with_0(tiny_model: Path) -> None:
    with Serving(str(tiny_model)) as serving:
        code, errors = serving.end(signal.SIGINT)
        assert code == 0, errors
        assert "Traceback" not in errors


_ENDLESS_CHECK = """
import pathlib, time
from nanovllm.server.openai import schemas

def check(value):
    pathlib.Path({path!r}).touch()
    while True:
        time.sleep(0.001)

schemas.check_prompts = check
"""


def test_a_signal_ends_it_with_0_while_a_large_body_is_checked(
    tiny_model: Path, tmp_path: Path
) -> None:
    """pydantic, in Rust, has frames below the check, which the interpreter cannot unwind."""
    begun = tmp_path / "begun"
    startup = _ENDLESS_CHECK.format(path=str(begun))
    (tmp_path / "sitecustomize.py").write_text(startup, encoding="utf-8")
    flags = (str(tiny_model), "--shutdown-timeout-s", "1")
    with Serving(*flags, variables={"PYTHONPATH": str(tmp_path)}) as serving:
        content = json.dumps({"prompt": "a" * 10_000})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Length: {len(content)}\r\n"
        with socket.create_connection(("127.0.0.1", serving.port), TIMEOUT_S) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{content}".encode())
            wait_until(begun.exists)
            code, errors = serving.end(signal.SIGTERM)
            assert code == 0, errors
            assert b" 503 " in connection.recv(1000)


@pytest.mark.parametrize(
    ("number", "backend"),
    [(signal.SIGTERM, "numpy"), (signal.SIGINT, "numba")],
    indirect=["backend"],
)
def test_a_signal_lets_a_stream_end_first(number: signal.Signals, backend: str) -> None:
    with Serving(
        "--backend", backend, "--num-threads", "1", "--shutdown-timeout-s", str(int(TIMEOUT_S))
    ) as serving:
        begun, received = threading.Event(), list[bytes]()
        reader = threading.Thread(
            target=lambda: received.append(serving.read_stream(begun, {"max_tokens": 300}))
        )
        reader.start()
        assert begun.wait(TIMEOUT_S)
        with closing(
            http.client.HTTPConnection("127.0.0.1", serving.port, timeout=TIMEOUT_S)
        ) as watching:  # neither its stream nor its pause may delay the end
            watching.request("GET", "/v1/engine/events")
            events = watching.getresponse()
            assert events.readline() == b"event: state\n"
            assert serving.ask("/v1/engine/control", {"action": "pause"})[1]["is_paused"]
            code, errors = serving.end(number)
            assert events.read().endswith(b"\n\n")
        reader.join(TIMEOUT_S)
        assert code == 0, errors
        assert "Traceback" not in errors
        assert b'"finish_reason":"length"' in received[0]
        assert received[0].endswith(b"data: [DONE]\n\n")


def is_listening(port: int) -> bool:
    """Whether a connection can be had."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("timeout_s", ["0", "1", "until a second signal"])
def test_requests_beyond_the_shutdown_timeout_get_an_error(timeout_s: str) -> None:
    """When the time is over, of which there may be none, clients get an error, no cut connection.

    After the first signal the log invites to send a second one, which ends the time.
    """
    has_second_signal = not timeout_s.isdigit()
    timeout_s = str(int(TIMEOUT_S)) if has_second_signal else timeout_s
    with Serving("--num-threads", "1", "--shutdown-timeout-s", timeout_s) as serving:
        begun, received = threading.Event(), list[Any]()
        long = {"max_tokens": 500, "n": 100, "ignore_eos": True}
        readers = [
            threading.Thread(target=lambda: received.append(serving.read_stream(begun, long))),
            threading.Thread(
                target=lambda: received.append(
                    serving.ask("/v1/completions", {"prompt": "Once upon a time", **long})
                )
            ),
        ]
        readers[0].start()
        assert begun.wait(TIMEOUT_S)
        # This starts after the stream has begun: its answers would take all slots before it.
        readers[1].start()
        wait_until(lambda: serving.ask("/load")[1]["queued_requests"] > 100)
        if has_second_signal:
            serving.process.send_signal(signal.SIGINT)
            wait_until(lambda: not is_listening(serving.port))
        code, errors = serving.end(signal.SIGINT if has_second_signal else signal.SIGTERM)
        for reader in readers:
            reader.join(TIMEOUT_S)
        assert code == 0, errors
        assert "Traceback" not in errors
        assert len(errors.splitlines()) < 12, errors  # no line for each of 200 requests
        whole, streamed = sorted(received, key=lambda one: isinstance(one, bytes))
        assert (whole[0], whole[1]["error"]["code"]) == (503, 503)
        assert b'"code": 503' in streamed
        assert streamed.endswith(b"data: [DONE]\n\n")


def test_a_client_that_does_not_read_does_not_keep_the_server_from_ending() -> None:
    """Its answer is larger than what the system takes for it."""
    body = {
        "prompt": [[7] * 400],
        "n": 5,
        "max_tokens": 20,
        "ignore_eos": True,
        "stream": True,
        "echo": True,
        "logprobs": 20,
        "prompt_logprobs": 20,
    }
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with Serving("--shutdown-timeout-s", "1") as serving, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(TIMEOUT_S)
        connection.connect(("127.0.0.1", serving.port))
        connection.sendall(head.encode() + content)
        assert connection.recv(12) == b"HTTP/1.1 200"
        code, errors = serving.end(signal.SIGTERM)
        assert code == 0, errors
        assert "Traceback" not in errors
