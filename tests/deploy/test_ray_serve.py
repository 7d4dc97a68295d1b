"""The application under Ray Serve, started on this machine once for all tests of this file."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("CI") and sys.platform == "linux" and importlib.util.find_spec("ray") is None:
    raise ImportError(".ci/run installs Ray, but it is missing")
pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install -e '.[ray]'")
pytestmark = pytest.mark.slow(60)

import ray  # noqa: E402
from ray import serve  # noqa: E402

from nanovllm.deploy.proxy import CALLBACK_VARIABLE  # noqa: E402
from nanovllm.deploy.ray_serve import build  # noqa: E402

START_S = 180.0


class Application:
    """Two replicas of a tiny model behind Ray Serve's proxy."""

    def __init__(self, model: Path, port: int) -> None:
        self.model, self.port = model, port

    def deploy(self, **options: object) -> None:
        """Deploy the application, or update it while it runs."""
        options = {"backend": "numpy", "kv-cache-memory": "8MiB", "block-size": 16, **options}
        model = {"model": str(self.model), "name": "tiny", "replicas": 2, "options": options}
        serve.run(build({"models": [model]}), name="nanovllm", route_prefix="/")

    def ask(self, path: str, body: object = None, timeout_s: float = 60) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def complete(self, **fields: Any) -> Any:
        status, content = self.ask(
            "/v1/completions", {"prompt": [1, 2, 3], "temperature": 0, "max_tokens": 8} | fields
        )
        assert status == 200, content
        return json.loads(content)["choices"]

    def wait_until_healthy(self) -> None:
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up:
            if self.ask("/health")[0] == 200:
                return
            time.sleep(0.2)
        pytest.fail(f"not healthy after {START_S} s")


@pytest.fixture(scope="module")
def application(tiny_model: Path) -> Iterator[Application]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    os.environ[CALLBACK_VARIABLE] = "nanovllm.deploy.proxy:middlewares"
    # A proxy that is slow to start on a busy machine is killed after 5 s otherwise.
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "90"
    os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"] = "90"
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        _system_config={"gcs_server_request_timeout_seconds": 120},
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        started = Application(tiny_model, port)
        started.deploy()
        started.wait_until_healthy()
        yield started
    finally:
        del os.environ[CALLBACK_VARIABLE]
        serve.shutdown()
        ray.shutdown()


def replica_pids() -> set[int]:
    """Return the processes of the model's replicas."""
    listing = subprocess.run(
        ["ps", "-eo", "pid,args"], check=True, capture_output=True, text=True
    ).stdout
    return {
        int(line.split()[0]) for line in listing.splitlines() if "ServeReplica" in line
        and "model-0" in line
    }  # fmt: skip


def test_completions_are_answered_whole_and_streamed(application: Application) -> None:
    (choice,) = application.complete()
    body = {"prompt": [1, 2, 3], "temperature": 0, "max_tokens": 8, "stream": True}
    status, content = application.ask("/v1/completions", body)
    events = [line[6:] for line in content.decode().splitlines() if line.startswith("data: ")]
    assert (status, events[-1]) == (200, "[DONE]")
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert text == choice["text"]


def test_answers_are_the_same_from_every_replica(application: Application) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: application.complete(max_tokens=24), range(16)))
    assert all(answer == answers[0] for answer in answers)


def test_errors_are_those_of_the_server(application: Application) -> None:
    status, content = application.ask("/v1/completions", {"prompt": [1], "max_tokens": -1})
    assert status == 400
    assert "max_tokens" in json.loads(content)["error"]["message"]
    status, content = application.ask("/v1/completions", {"model": "other", "prompt": [1]})
    assert status == 404
    assert "served: tiny" in json.loads(content)["error"]["message"]
    assert application.ask("/v1/completions", "no object")[0] == 400
    assert application.ask("/nothing")[0] == 404


def test_the_proxy_does_not_list_its_applications(application: Application) -> None:
    assert application.ask("/-/routes")[0] == 404
    assert application.ask("/-/healthz")[0] == 200


def test_metrics_have_every_replica(application: Application) -> None:
    application.complete()
    page = application.ask("/metrics")[1].decode()
    running = re.findall(r'num_requests_running{replica="(\w+)",model_name="tiny"} 0.0', page)
    assert len(set(running)) == 2
    assert page.count("# TYPE nanovllm:generation_tokens_total counter") == 1


def test_a_shared_prefix_stays_on_one_replica(application: Application) -> None:
    prefix = [5 + index % 80 for index in range(64)]
    before = hits(application)
    for own in range(6):
        application.complete(prompt=[*prefix, own], max_tokens=1)
    assert hits(application) - before >= 5 * 64


def hits(application: Application) -> float:
    page = application.ask("/metrics")[1].decode()
    name = "nanovllm:prefix_cache_hits_total{"
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


def test_a_killed_replica_is_replaced(application: Application) -> None:
    pids = replica_pids()
    if len(pids) != 2:
        pytest.skip("the replicas' processes cannot be found by their names")
    with ThreadPoolExecutor(6) as threads:
        running = [
            threads.submit(
                application.ask,
                "/v1/completions",
                {"prompt": [1, 2, index], "max_tokens": 100, "ignore_eos": True, "n": 4},
            )
            for index in range(6)
        ]
        time.sleep(0.1)
        os.kill(min(pids), signal.SIGKILL)
        statuses = [future.result()[0] for future in running]
    assert set(statuses) <= {200, 503}
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up:
        if len(replica_pids() - {min(pids)}) == 2:
            break
        time.sleep(0.2)
    assert application.complete()


def test_a_rolling_update_loses_no_request(application: Application) -> None:
    application.wait_until_healthy()
    before = replica_pids()
    is_over = threading.Event()

    def ask_again_and_again() -> list[int]:
        statuses = []
        while not is_over.is_set():
            body = {"prompt": [1, 2, 3], "max_tokens": 20, "ignore_eos": True}
            statuses.append(application.ask("/v1/completions", body)[0])
        return statuses

    with ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(ask_again_and_again) for _ in range(4)]
        try:
            application.deploy(**{"max-num-seqs": 8})
        finally:
            is_over.set()
        statuses = [status for client in clients for status in client.result()]
    assert len(statuses) > 20
    assert set(statuses) == {200}
    assert not before & replica_pids()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "tiny-books", "replicas": 9}, r"need 9 CPUs .* but the cluster has 2"),
        ({"model": "./nothing"}, "does not exist"),
        ({"model": "tiny-books", "options": {"quantization": "int3"}}, "is not valid"),
        ({"model": "tiny-books", "options": {"max-model-len": 9999}}, "has only 512 positions"),
        ({"model": "tiny-books", "options": {"chat-template": "nothing"}}, "template nothing"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(
    application: Application, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        build({"models": [settings]})


def test_models_with_one_name_are_refused(application: Application) -> None:
    with pytest.raises(ValueError, match="two models have the name 'tiny-books'"):
        build({"models": [{"model": "tiny-books"}, {"model": "tiny-books"}]})
