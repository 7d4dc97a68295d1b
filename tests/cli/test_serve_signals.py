"""Signals to `nanovllm serve`: drain, reload, and the end of its terminal."""

import errno
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import pytest

from nanovllm.cli.service_manager import Terminal
from tests.support.serve_command import TIMEOUT_S, Serving
from tests.support.serving import wait_until

pty = pytest.importorskip("pty", reason="needs pseudoterminals and SIGHUP")


def test_it_reloads_keys_and_drains_before_it_stops(tiny_model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n", encoding="utf-8")
    with (
        tempfile.TemporaryDirectory() as folder,  # a short name: that of a socket is limited
        closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager,
    ):
        manager.settimeout(TIMEOUT_S)
        manager.bind(f"{folder}/notify")
        flags = ["--api-key-file", str(keys), "--drain-delay-s", "600", "--num-threads", "1"]
        flags += ["--inspector-controls"]
        variables = {"NOTIFY_SOCKET": f"{folder}/notify"}
        with Serving(str(tiny_model), *flags, variables=variables) as serving:
            assert manager.recv(100) == b"READY=1"
            check_reload(serving, keys)
            check_drain(serving)
            assert manager.recv(100) == b"STOPPING=1"


def status(serving: Serving, key: str) -> int:
    return serving.ask("/v1/models", Authorization=f"Bearer {key}")[0]


def check_reload(serving: Serving, keys: Path) -> None:
    """An invalid file changes nothing, a valid one replaces the keys."""
    keys.write_text("# no key\n", encoding="utf-8")
    serving.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "has no key in it" in serving.errors)
    assert "SIGHUP: --api-key-file" in serving.errors
    assert (status(serving, "first"), status(serving, "second")) == (200, 401)
    keys.write_text("second\nthird\n", encoding="utf-8")
    serving.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "SIGHUP: read 2 API keys again" in serving.errors)
    assert [status(serving, key) for key in ("first", "second", "third")] == [401, 200, 200]


def check_drain(serving: Serving) -> None:
    """A pause ends, /health is 503 while requests are served; a second signal ends the delay."""
    key = {"Authorization": "Bearer second"}
    paused = serving.ask("/v1/engine/control", {"action": "pause"}, **key)[1]
    assert paused["is_paused"]
    with closing(http.client.HTTPConnection("127.0.0.1", serving.port, timeout=TIMEOUT_S)) as idle:
        idle.request("GET", "/health")
        assert idle.getresponse().read() == b'{"status":"ready"}'
        serving.process.send_signal(signal.SIGTERM)
        wait_until(lambda: serving.ask("/health")[0] == 503)
        assert "about to stop" in serving.ask("/health")[1]["error"]["message"]
        wait_until(lambda: not serving.ask("/v1/engine/state", **key)[1]["is_paused"])
        idle.request("GET", "/v1/models", headers=key)
        response = idle.getresponse()
        assert (response.status, response.getheader("connection")) == (200, "close")
    begun, received = threading.Event(), list[bytes]()

    reader = threading.Thread(
        target=lambda: received.append(serving.read_stream(begun, {"max_tokens": 100}, **key))
    )
    reader.start()
    assert begun.wait(TIMEOUT_S)
    code, errors = serving.end(signal.SIGTERM)
    reader.join(TIMEOUT_S)
    assert code == 0, errors
    assert "Traceback" not in errors
    assert received[0].endswith(b"data: [DONE]\n\n")


HANGUP_DURING_IMPORTS = """
import os, signal, sys
from nanovllm.cli.main import main

class Hangup:
    def find_spec(self, name, *_):
        if name == "uvicorn":
            os.kill(os.getpid(), signal.SIGHUP)
            print("still here", flush=True)
            os._exit(0)

sys.meta_path.insert(0, Hangup())
main(["serve"])
"""


def test_a_hangup_during_imports_does_not_end_it() -> None:
    command = [sys.executable, "-c", HANGUP_DURING_IMPORTS]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (ran.returncode, ran.stdout) == (0, "still here\n"), ran.stderr


def test_a_terminal_counts_as_open_while_no_file_can_be_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the SIGHUP that reloads the keys of a busy server would stop it."""
    number = errno.EMFILE

    def refuse(path: str, flags: int) -> int:
        raise OSError(number, path)

    monkeypatch.setattr(os, "open", refuse)
    terminal = Terminal()
    assert not terminal.was_closed()
    number = errno.ENXIO
    monkeypatch.setattr(
        os, "open", lambda path, flags: os.dup(1) if path == os.devnull else refuse(path, flags)
    )
    assert terminal.was_closed()


@pytest.mark.skipif(sys.platform != "linux", reason="needs the hangup of Linux's terminals")
@pytest.mark.parametrize("is_ignored", [False, True])
def test_it_stops_when_its_terminal_is_closed(
    tiny_model: Path, tmp_path: Path, is_ignored: bool
) -> None:
    """The terminal hangs up with SIGHUP, which is no order to reload; the delay ends by itself.

    Under nohup, which ignores the signal, the server goes on.
    """
    log = tmp_path / "log"
    take_terminal = (
        "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if is_ignored else 'SIG_DFL'}); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    serve = ["-m", "nanovllm.cli.main", "serve", str(tiny_model), "--port", "0"]
    flags = ["--num-threads", "1", "--drain-delay-s", "1"]
    screen, terminal = pty.openpty()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", take_terminal, *serve, *flags],
            stdin=terminal, stdout=terminal, stderr=errors, start_new_session=True,
        )  # fmt: skip
    os.close(terminal)
    shown = b""
    while b"  curl " not in shown:
        shown += os.read(screen, 1000)
    os.close(screen)
    if is_ignored:
        wait_until(lambda: "SIGHUP: there is nothing to reload" in log.read_text(encoding="utf-8"))
        port = int(re.findall(rb"Serving on http://127.0.0.1:(\d+)", shown)[0])
        with closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        ) as connection:
            connection.request("GET", "/health")  # whose line in the log goes nowhere
            assert connection.getresponse().status == 200
        process.send_signal(signal.SIGTERM)
    code = process.wait(TIMEOUT_S)
    text = log.read_text(encoding="utf-8")
    assert code == 0, text
    assert ("The terminal was closed" in text) is not is_ignored
    assert "Draining for 1 s" in text
    assert "Application shutdown complete" in text
    assert "Traceback" not in text, text
