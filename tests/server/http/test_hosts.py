"""The `Host` check: a web page must not reach the server under its own name (DNS rebinding)."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nanovllm.server.http.auth import host_name
from tests.support.serving import RunningServer, loader, read_error


@pytest.fixture(scope="module")
def checking(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server that answers to one name beside its addresses."""
    with RunningServer(loader(tiny_model), allowed_hosts=("gpu.example",)) as running:
        yield running


def ask(server: RunningServer, host: str, path: str = "/version") -> httpx.Response:
    return server.http.get(path, headers={"host": host})


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "a.localhost", "127.0.0.1:1", "[::1]:8000", "192.168.1.5",
     "gpu.example", "GPU.example.:80"],
)  # fmt: skip
def test_names_that_dns_cannot_rebind_are_answered(checking: RunningServer, host: str) -> None:
    assert ask(checking, host).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "gpu.example.evil.example", "127.0.0.1.nip.io", "localhost.evil.example",
     "xlocalhost", "[evil]", "127.1x", "[::1].evil.example", "[localhost]",
     "localhost:80.evil.example"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/version", "/health", "/nope"])
def test_other_hosts_are_refused_with_the_remedy(
    checking: RunningServer, host: str, path: str
) -> None:
    error = read_error(ask(checking, host, path), 403)
    assert error["type"] == "PermissionDeniedError"
    assert host in error["message"]
    assert "--allowed-hosts" in error["message"]


def test_it_is_documented_where_it_is_checked(
    checking: RunningServer, server: RunningServer
) -> None:
    for running, is_checked in ((checking, True), (server, False)):
        operation = running.http.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]
        assert ("403" in operation["responses"]) is is_checked


def test_a_server_that_does_not_check_answers_to_any(server: RunningServer) -> None:
    assert ask(server, "evil.example").status_code == 200


def test_ports_and_brackets_are_no_part_of_a_name() -> None:
    assert host_name("[::1]:80") == "::1"
    assert host_name("A.b.:80") == "a.b"
    assert host_name("") == ""
