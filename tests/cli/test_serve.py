"""`nanovllm serve` as a process: its output, keys, TLS, and errors at the start."""

import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from openai import OpenAI

from nanovllm.cli.main import main
from nanovllm.cli.serving import describe
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from tests.support.certificates import make_certificate, needs_openssl
from tests.support.checkpoints import write_tiny_model
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


def test_it_names_the_family(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, config={"model_type": "qwen2"})
    with closing(Engine.load(folder, EngineConfig(backend="numpy"))) as engine:
        assert describe(engine, "tiny").startswith("tiny, Llama architecture\n")


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
