"""`nanovllm serve` as a process: output, shutdown, and errors at the start."""

import argparse
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from nanovllm.cli.main import build_parser, main
from nanovllm.cli.options import engine_config
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.cli.serving import describe, load_server, server_settings, shell_key, startup_message
from nanovllm.config import EngineConfig
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.errors import CheckpointError
from nanovllm.server.service import ServerSettings
from tests.support.certificates import make_certificate, needs_openssl
from tests.support.serve_command import TIMEOUT_S, Serving
from tests.support.serving import wait_until


@pytest.fixture(scope="module")
def bundled(backend: str) -> Iterator[Serving]:
    """The bundled model with default options; the backend is the default, or numpy."""
    with Serving(
        *(() if backend == EngineConfig().backend else ("--backend", backend)), "--num-threads", "1"
    ) as serving:
        yield serving
        code, errors = serving.end(signal.SIGTERM)
        assert code == 0, errors


def test_it_prints_the_model_and_where_it_is(bundled: Serving, backend: str) -> None:
    text = "".join(bundled.startup_lines)
    assert "tiny-books, GPT-2 architecture" in text
    rows = {
        line[2:14].strip(): line[14:].strip()
        for line in bundled.startup_lines
        if line.startswith("  ")
    }
    assert rows["vocabulary"] == "2,048 tokens"
    assert rows["hidden size"] == "288"
    assert rows["layers"] == "6"
    assert rows["heads"] == "6 of 48"
    assert rows["parameters"] == "6,732,288"
    assert rows["context"] == "512 tokens"
    assert "tokens in" in rows["KV cache"]
    assert rows["computes in"] == f"float32 (cache float32), backend {backend}, 1 thread"
    assert f"Serving on http://127.0.0.1:{bundled.port}" in text


def test_it_says_who_drafts(tiny_model: Path) -> None:
    drafts = {"model": str(tiny_model), "method": "ngram"}
    for settings, rows in ((None, []), (drafts, [f"n-grams and {tiny_model.name}"])):
        config = EngineConfig(backend="numpy", speculative_config=settings)
        with closing(Engine.load(tiny_model, config)) as engine:
            lines = describe(engine, "tiny").splitlines()
        assert [line.partition(" by ")[2] for line in lines if "  drafts  " in line] == rows


def test_a_draft_model_of_another_vocabulary_opens_no_port(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.cli.serving.bind", None)
    drafts = '{"model": "tiny-books-draft"}'
    assert main(["serve", str(tiny_model), "--speculative-config", drafts]) == 1
    assert "has another vocabulary than the model (2,048 and 267" in capsys.readouterr().err


def test_a_page_cannot_reach_it_under_a_name_of_its_own(bundled: Serving) -> None:
    status, answer = bundled.ask("/v1/models", Host="rebound.example")
    assert (status, answer["error"]["type"]) == (403, "PermissionDeniedError")
    assert bundled.ask("/v1/models", Host="localhost")[0] == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_line_works_as_it_is(bundled: Serving) -> None:
    line = next(line for line in bundled.startup_lines if line.startswith("  curl "))
    done = subprocess.run(
        ["sh", "-c", f"{line.strip()} --silent --noproxy '*'"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    body = json.loads(done.stdout)
    assert body["model"] == "tiny-books"
    assert body["usage"]["completion_tokens"] >= 1


def test_the_bundled_model_writes_english(bundled: Serving) -> None:
    with OpenAI(
        base_url=f"http://127.0.0.1:{bundled.port}/v1", api_key="none", max_retries=0
    ) as client:
        answer = (
            client.completions.create(
                model="tiny-books",
                prompt="Once upon a time",
                max_tokens=60,
                temperature=0.6,
                seed=20,
            )
            .choices[0]
            .text
        )
    words = {word.strip(".,;:!?\"'").lower() for word in answer.split()}
    assert (
        len(words & {"the", "a", "and", "of", "to", "was", "in", "he", "she", "it", "that", "had"})
        >= 3
    ), answer


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


def read_stream(port: int, begun: threading.Event, **body: Any) -> bytes:
    """A streamed answer, as it came; `begun` is set when the first of it is there."""
    content = json.dumps({"prompt": "Once upon a time", "stream": True, "ignore_eos": True, **body})
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as connection:
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
        with closing(connection.getresponse()) as response:
            received = response.readline()
            begun.set()
            return received + response.read()


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
            target=lambda: received.append(read_stream(serving.port, begun, max_tokens=300))
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
            threading.Thread(
                target=lambda: received.append(read_stream(serving.port, begun, **long))
            ),
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
        assert len(errors.splitlines()) < 10, errors
        whole, streamed = sorted(received, key=lambda one: isinstance(one, bytes))
        assert (whole[0], whole[1]["error"]["code"]) == (503, 503)
        assert b'"code": 503' in streamed
        assert streamed.endswith(b"data: [DONE]\n\n")


def test_a_public_server_without_keys_warns_and_logs_the_peer_address(tiny_model: Path) -> None:
    with Serving(str(tiny_model), "--host", "0.0.0.0", "--num-threads", "1") as serving:
        forged = {"X-Forwarded-For": "\x1b[31mforged", "Host": "any.example"}
        assert serving.ask("/v1/models", **forged)[0] == 200
        code, errors = serving.end(signal.SIGTERM)
    assert code == 0
    assert "warning: 0.0.0.0 can be reached from other machines and there are no API keys" in errors
    printed = serving.printed()
    assert "GET /v1/models" in printed
    assert "forged" not in printed + errors


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


def test_the_key_may_come_from_the_environment(tiny_model: Path) -> None:
    with Serving(
        str(tiny_model), variables={"NANOVLLM_API_KEY": " from the environment\n"}
    ) as serving:
        assert serving.ask("/v1/models")[0] == 401
        assert serving.ask("/health")[0] == 200
        assert serving.ask("/v1/models", Authorization="Bearer from the environment")[0] == 200
        text = "".join(serving.startup_lines)
        assert '-H "Authorization: Bearer $NANOVLLM_API_KEY"' in text
        assert "from the environment" not in text
        code, errors = serving.end(signal.SIGTERM)
        assert code == 0
        assert "from the environment" not in errors


def test_a_flag_goes_before_the_environment_and_names_may_be_given(tiny_model: Path) -> None:
    flags = (
        "--api-key",
        "flag",
        "--served-model-name",
        "it's",
        "--served-model-name",
        "other",
        "--max-model-len",
        "64",
        "--max-num-seqs",
        "2",
    )
    with Serving(str(tiny_model), *flags, variables={"NANOVLLM_API_KEY": "variable"}) as serving:
        assert serving.ask("/v1/models", Authorization="Bearer variable")[0] == 401
        status, body = serving.ask("/v1/models", Authorization="Bearer flag")
        assert status == 200
        assert [(model["id"], model["max_model_len"]) for model in body["data"]] == [
            ("it's", 64),
            ("other", 64),
        ]


@needs_openssl
def test_over_tls_with_keys_from_a_file_every_request_is_logged(
    tiny_model: Path, tmp_path: Path
) -> None:
    made = make_certificate(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text("# of the team\nfirst-secret\nsecond-secret\n", encoding="utf-8")
    flags = (
        "--ssl-certfile",
        str(made.certfile),
        "--ssl-keyfile",
        str(made.keyfile),
        "--api-key-file",
        str(keys),
        "--log-requests",
    )
    with Serving(str(tiny_model), *flags, "--log-level", "debug") as serving:
        assert f"Serving on https://127.0.0.1:{serving.port} - try:" in "".join(
            serving.startup_lines
        )
        context = ssl.create_default_context(cafile=made.certfile)
        body = {"prompt": "a private prompt", "max_tokens": 3, "ignore_eos": True}
        answers = []
        for key in ("first-secret", "second-secret", "third-secret"):
            connection = http.client.HTTPSConnection(
                "127.0.0.1", serving.port, timeout=TIMEOUT_S, context=context
            )
            headers = {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {key}",
                "X-Request-Id": "tls",
            }
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            answers.append(
                (
                    response.status,
                    response.getheader("x-request-id"),
                    len(json.loads(response.read())),
                )
            )
            connection.close()
        assert [(status, name) for status, name, _ in answers] == [
            (200, "tls"),
            (200, "tls"),
            (401, "tls"),
        ]
        with socket.create_connection(("127.0.0.1", serving.port), timeout=TIMEOUT_S) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" not in plain.recv(100), "it answers without TLS too"
        if hasattr(signal, "SIGHUP"):
            renew_certificate(serving, tmp_path)
        code, errors = serving.end(signal.SIGTERM)
    assert code == 0, errors
    assert "Traceback" not in errors
    lines = [json.loads(line) for line in serving.printed().splitlines()]
    assert [
        (line["request_id"], line["path"], line["status"], line["completion_tokens"])
        for line in lines
        if line["path"] != "/health"
    ] == [
        ("tls", "/v1/completions", 200, 3),
        ("tls", "/v1/completions", 200, 3),
        ("tls", "/v1/completions", 401, None),
    ]
    for hidden in ("secret", "private"):
        assert hidden not in errors


def renew_certificate(serving: Serving, folder: Path) -> None:
    """Replace certificate and key, reload, and expect the new one, without and with a name."""
    old = ssl.create_default_context(cafile=folder / "certificate.pem")
    with ssl_connection(serving.port, old) as connected_before:
        (folder / "key.pem").write_text("damaged", encoding="utf-8")
        serving.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "the old API keys and certificate stay in use" in serving.errors)
        ssl_connection(serving.port, old).close()
        made = make_certificate(folder)
        serving.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "read 2 API keys and the TLS certificate again" in serving.errors)
        new = ssl.create_default_context(cafile=made.certfile)
        ssl_connection(serving.port, new).close()
        new.check_hostname = False
        ssl_connection(serving.port, new, "other.example").close()
        with pytest.raises(ssl.SSLCertVerificationError):
            ssl_connection(serving.port, old)
        connected_before.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connected_before.recv(12) == b"HTTP/1.1 200"


def ssl_connection(port: int, context: ssl.SSLContext, name: str = "127.0.0.1") -> ssl.SSLSocket:
    """A connection whose handshake is complete."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    try:
        return context.wrap_socket(connection, server_hostname=name)
    except ssl.SSLError:
        connection.close()
        raise


def ended(*flags: str) -> tuple[int, str]:
    """Exit code and standard error of a server that ends by itself."""
    command = [sys.executable, "-m", "nanovllm.cli.main", "serve", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return done.returncode, done.stderr


def test_a_port_in_use_is_an_error(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        code, errors = ended(str(tiny_model), "--port", str(other.getsockname()[1]))
    assert code == 1
    assert "address already in use" in errors
    assert "choose another by --port" in errors
    assert "startup complete" not in errors, "the port is checked before the model"
    assert errors.count("address already in use") == 1
    assert "Traceback" not in errors
    assert "cannot be loaded" not in errors


def test_a_foreign_address_is_an_error(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tiny_model), "--host", "192.0.2.1", "--port", "8000"]) == 1
    errors = capsys.readouterr().err
    assert "nanovllm: cannot listen on 192.0.2.1 port 8000: " in errors
    assert "choose an address of this machine by --host" in errors


def test_flags_are_taken_by_their_whole_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--max-num-seq", "3"])
    told = "unrecognized option --max-num-seq; did you mean --max-num-seqs?"
    assert told in capsys.readouterr().err


def test_a_folder_without_a_model_is_an_error_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("nanovllm: ")
    assert "config.json" in errors
    assert "Traceback" not in errors


def test_weights_that_are_cut_off_are_said_without_a_traceback(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, errors = ended(str(folder), "--port", "0")
    assert code == 1
    assert "nanovllm: the model cannot be loaded" in errors
    assert "model.safetensors" in errors
    assert "Traceback" not in errors


def test_a_cache_without_a_block_is_an_error_without_traceback(tiny_model: Path) -> None:
    """Which is known only where the engine is made, and the server listens already."""
    code, errors = ended(str(tiny_model), "--port", "0", "--kv-cache-memory", "1KiB")
    assert code == 1
    assert "less than one block" in errors
    assert "Traceback" not in errors


WRONG_FLAGS = {
    "a path to nothing": (("./nothing-here",), "does not exist", 1),
    "an empty key": (("--api-key", ""), "--api-key is empty", 1),
    "no file of keys": (
        ("--api-key-file", "./nothing-here"),
        "--api-key-file nothing-here cannot be read: No such file",
        1,
    ),
    "no origin": (
        ("--allowed-origins", "example.org"),
        "'example.org' but an origin is scheme://host",
        1,
    ),
    "no certificate": (("--ssl-keyfile", "key.pem"), "--ssl-keyfile needs --ssl-certfile", 1),
    "prompts without requests": (("--log-prompts",), "--log-prompts needs --log-requests", 1),
    "more context than there is": (
        ("--port", "0", "--max-model-len", "5000"),
        "nanovllm: max_model_len is 5000",
        1,
    ),
    "a port that is none": (("--port", "70000"), "70000 must be an integer, from 0 to 65535", 2),
    "no number of requests": (("--max-queued-requests", "0"), "at least 1", 2),
}


class ServedError(Exception):
    """Raised where a server would begin, by `never_serve`."""


def never_serve(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """Stop `nanovllm serve` where it creates its application; return the settings."""
    given: list[ServerSettings] = []

    def stop(engine: object, settings: ServerSettings, *others: object, **parts: object) -> None:
        given.append(settings)
        raise ServedError

    monkeypatch.setattr("nanovllm.cli.serving.create_app", stop)
    return given


def test_forwarded_addresses_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def stop(*_: object, **options: Any) -> None:
        given.append(options)
        raise ServedError

    monkeypatch.setattr("nanovllm.cli.serving.uvicorn.Config", stop)
    parsed = build_parser().parse_args(["serve"])
    with pytest.raises(ServedError):
        parsed.run(parsed)
    assert given[0]["proxy_headers"] is False


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_an_invalid_option_is_an_error(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, message, expected = WRONG_FLAGS[name]
    never_serve(monkeypatch)
    try:
        code: object = main(["serve", *flags])
    except SystemExit as ending:
        code = ending.code
    out, errors = capsys.readouterr()
    assert (code, out) == (expected, "")
    assert message in errors


def serve_options(*flags: str) -> ServeOptions:
    return ServeOptions.of(build_parser().parse_args(["serve", *flags]))


@pytest.mark.parametrize("name", ["plain", "it's", 'a "quoted" one', "$HOME `x`", "naïve\\"])
@pytest.mark.parametrize(
    ("variable", "keys"), [("k 1", None), ("k 1,k 2,k 3", None), ("other", "# team\n\nk 1\nk 2\n")]
)
@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_the_curl_command_quotes_any_model_name(
    tmp_path: Path, name: str, variable: str, keys: str | None
) -> None:
    flags = [] if keys is None else ["--api-key-file", str(tmp_path / name.replace("/", ""))]
    if keys is not None:
        Path(flags[1]).write_text(keys, encoding="utf-8")
    key = shell_key(serve_options(*flags), variable.count(",") + 1)
    line = startup_message("http://127.0.0.1:1", name, 64, key).splitlines()[-1].strip()
    script = f"curl() {{ printf '%s\\0' \"$@\"; }}\n{line}"
    done = subprocess.run(
        ["sh", "-c", script],
        capture_output=True,
        check=True,
        env={**os.environ, "NANOVLLM_API_KEY": variable},
    )
    url, _, key, _, content_type, _, body = done.stdout.decode().rstrip("\0").split("\0")
    assert (url, key, content_type) == (
        "http://127.0.0.1:1/v1/completions",
        "Authorization: Bearer k 1",
        "Content-Type: application/json",
    )
    assert json.loads(body)["model"] == name
    assert json.loads(body)["max_tokens"] == 32  # half of the context, beside a short prompt


def test_flags_are_the_settings_names() -> None:
    parsed: argparse.Namespace = build_parser().parse_args(
        ["serve", "gpt2", "--max-num-seqs", "3", "--no-enable-prefix-caching", "--host", "::"]
    )
    assert (parsed.model, parsed.max_num_seqs, parsed.enable_prefix_caching, parsed.host) == (
        "gpt2",
        3,
        False,
        "::",
    )


def test_priorities_count_only_where_a_flag_says_so() -> None:
    parse = build_parser().parse_args
    for command in (["serve"], ["run-batch", "-i", "a", "-o", "b"]):
        assert engine_config(parse(command)).scheduling_policy == "fcfs"
        allowed = parse([*command, "--scheduling-policy", "priority"])
        assert engine_config(allowed).scheduling_policy == "priority"


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ((), "fcfs"),
        (("--api-key", "a"), "fcfs"),
        (("--api-key-file", "keys"), "fair"),
        (("--api-key", "a", "--api-key", "b"), "fair"),
        (("--api-key", "a", "--api-key", "b", "--scheduling-policy", "fcfs"), "fcfs"),
        (("--scheduling-policy", "fair"), "fair"),
    ],
)
def test_several_keys_get_equal_shares_unless_the_policy_is_set(
    flags: tuple[str, ...], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may get more keys while the server runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("a\n", encoding="utf-8")
    configs = []
    monkeypatch.setattr(Engine, "check", lambda folder, config: configs.append(config))
    load_server(serve_options(*flags))
    assert [config.scheduling_policy for config in configs] == [policy]


@pytest.mark.parametrize(
    ("flags", "inspector"),
    [
        ((), (True, False, True)),
        (("--host", "0.0.0.0"), (True, False, False)),
        (("--host", "0.0.0.0", "--inspector-controls"), (True, False, True)),
        (("--no-inspector-controls",), (True, False, False)),
        (("--api-key", "k"), (True, False, False)),
        (("--api-key", "k", "--inspector-controls"), (True, False, True)),
        (("--no-inspector", "--inspector-shows-prompts"), (False, True, True)),
    ],
)
def test_controls_need_a_loopback_address_without_keys_or_a_flag(
    flags: tuple[str, ...], inspector: tuple[bool, bool, bool]
) -> None:
    settings = server_settings(serve_options(*flags))
    assert (
        settings.has_inspector,
        settings.inspector_shows_prompts,
        settings.inspector_controls,
    ) == inspector


def test_the_patience_with_clients_may_be_given() -> None:
    patient = server_settings(serve_options("--stalled-client-s", "2.5"))
    assert patient.stalled_client_s == 2.5
    default = ServerSettings(model_names=("x",)).stalled_client_s
    assert server_settings(serve_options()).stalled_client_s == default


def chat_template_of(monkeypatch: pytest.MonkeyPatch, *flags: str) -> ChatTemplate | None:
    """The template that the server would answer chats with."""
    given = never_serve(monkeypatch)
    parsed = build_parser().parse_args(["serve", *flags])
    with pytest.raises(ServedError):
        parsed.run(parsed)
    return given[0].chat_template


def test_the_chat_template_is_the_flags_or_the_models(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    assert chat_template_of(monkeypatch, str(folder)) is None
    (folder / "tokenizer_config.json").write_text(
        '{"chat_template": "{% of the model", "eos_token": "</s>"}'
    )
    own = chat_template_of(monkeypatch, str(folder))
    assert own is not None
    assert (own.source, own.special_tokens["eos_token"]) == ("{% of the model", "</s>"), (
        "a server goes on without chat where it is damaged"
    )
    plain = chat_template_of(monkeypatch, str(folder), "--chat-template", "plain")
    assert plain is not None
    assert plain.stop_strings == ("\nUser:",)
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}")
    given = chat_template_of(monkeypatch, str(folder), "--chat-template", str(file))
    assert given is not None
    assert (given.source, given.special_tokens["eos_token"]) == (
        "{{ messages[0].content }}",
        "</s>",
    )


def test_an_invalid_chat_template_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    for content, message in ((None, "cannot be read"), ("{% if %}", "is not valid")):
        if content is not None:
            file.write_text(content)
        parsed = build_parser().parse_args(["serve", str(tiny_model), "--chat-template", str(file)])
        with pytest.raises(
            CheckpointError, match=rf"the chat template \S*template\.jinja {message}"
        ):
            parsed.run(parsed)
