"""The deployments that the benchmarks compare: a server, and replicas under Ray Serve.

Both are context managers that yield a `Deployment`. Ray needs the extra `ray`.
"""

import contextlib
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.server_process import ServerProcess

START_TIMEOUT_S = 300.0
APPLICATION = "nanovllm"


@dataclass(frozen=True, slots=True)
class Deployment:
    """Something that answers at a URL."""

    url: str

    def ask(self, path: str, body: object = None, timeout_s: float = 300) -> tuple[int, bytes]:
        """Return the status and the content of an answer; raises OSError without one."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def metric(self, name: str) -> dict[str, float]:
        """Return the values of a metric by replica; a single server is replica ''."""
        values: dict[str, float] = {}
        for line in self.ask("/metrics")[1].decode().splitlines():
            if line.startswith(f"nanovllm:{name}{{"):
                labels, _, value = line.rpartition(" ")
                _, is_labelled, rest = labels.partition('replica="')
                replica = rest.partition('"')[0] if is_labelled else ""
                values[replica] = values.get(replica, 0.0) + float(value)
        return values

    def wait_until_healthy(self) -> None:
        """Wait for 200 from /health; raises TimeoutError."""
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_s:
            with contextlib.suppress(OSError):
                if self.ask("/health", timeout_s=5)[0] == 200:
                    return
            time.sleep(0.1)
        raise TimeoutError(f"{self.url} was not healthy within {START_TIMEOUT_S:g} s")


@contextlib.contextmanager
def one_server(model: str, threads: int, options: Sequence[str]) -> Iterator[Deployment]:
    """Run `nanovllm serve` in a process of its own."""
    flags = [model, "--num-threads", str(threads), "--log-level", "warning", *options]
    with ServerProcess(flags) as server:
        yield Deployment(f"http://127.0.0.1:{server.port}")


@contextlib.contextmanager
def ray_cluster(cpus: int) -> Iterator[int]:
    """Start Ray and Ray Serve's proxy on this machine; yield the proxy's port."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # noqa: PLC0415 - an extra
    from ray import serve  # noqa: PLC0415

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    ray.init(
        num_cpus=cpus, include_dashboard=False, log_to_driver=False, configure_logging=False,
        _system_config={"gcs_server_request_timeout_seconds": 120},
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(port: int, args: Mapping[str, Any]) -> Deployment:
    """Deploy the application with these `args`, or update it, and wait until it answers."""
    from ray import serve  # noqa: PLC0415 - an extra

    from nanovllm.deploy.ray_serve import build  # noqa: PLC0415

    serve.run(build(dict(args)), name=APPLICATION, route_prefix="/")
    deployment = Deployment(f"http://127.0.0.1:{port}")
    deployment.wait_until_healthy()
    return deployment
