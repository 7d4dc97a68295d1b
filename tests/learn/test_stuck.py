"""A call of the reader's code that cannot be interrupted: the server says so, and requests end."""

import os
import re
import threading
from pathlib import Path

import pytest

from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.learn.engine import learn_parts
from nanovllm.learn.guard import ReadersFaultError
from tests.learn.test_learn_engine import CLASSROOM
from tests.learn.test_learn_faults import SCHEDULER, folder_with
from tests.support.serving import RunningServer, read_error

PLACE = r"step09_scheduler\.py, line \d+, in schedule: it did not end within 0\.2 s, and cannot"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe with a name")
def test_a_call_that_never_ends_fails_the_engine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.learn.scheduler.TEXT_S", 0.2)
    monkeypatch.setattr("nanovllm.learn.guard.GRACE_S", 0.2)
    pipe = tmp_path / "pipe"  # opening it waits for a writer
    os.mkfifo(pipe)
    start = "        chunks: list[Chunk] = []"
    folder = folder_with(
        tmp_path / "gpt", SCHEDULER, start,
        "        if any(9 in one.prompt for one in self.waiting):\n"
        f"            open({str(pipe)!r}).close()\n{start}",
    )  # fmt: skip
    reports: list[str] = []

    def fail(error: ReadersFaultError, thread: int) -> None:
        reports.append(str(error))
        assert not server.engine.fail(error, threading.get_ident()), "another thread is stuck"
        assert server.engine.fail(error, thread)

    parts = learn_parts(folder, fail)
    server = RunningServer(lambda: Engine.load(tiny_model, EngineConfig(**CLASSROOM), parts))
    with server:
        body = {"model": "alias", "prompt": [1, 2], "max_tokens": 3}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        assert server.http.get("/health").status_code == 200
        failed = server.http.post("/v1/completions", json={**body, "prompt": [9]})
        assert failed.status_code == 500
        message = failed.json()["error"]["message"]
        assert re.match(PLACE, message)
        for response in (
            server.http.get("/health"),
            server.http.post("/v1/completions", json=body),
        ):
            problem = read_error(response, 503)["message"]
            assert problem == f"the engine has failed: {message}; restart the server"
        with pipe.open("w"):  # the call ends, and with it the engine's thread
            pass
    assert reports == [message]
