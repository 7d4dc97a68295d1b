"""Request ids: a client's own name, or another for every request."""

import re

import pytest

from tests.support.serving import RunningServer

VALID_IDS = ["a", "A-1_b.c:d", "x" * 128, "550e8400-e29b-41d4-a716-446655440000"]
INVALID_IDS = [
    b"",
    b"a b",
    b"x" * 129,
    b"\xff",
    "é".encode(),
    b"a;b",
    b'a"b',
    b"<a>",
    b"a/b",
    b"%0a",
]


@pytest.mark.parametrize("given", VALID_IDS)
def test_a_clients_own_name_comes_back(server: RunningServer, given: str) -> None:
    headers = {"x-request-id": given}
    for response in (
        server.http.get("/health", headers=headers),
        server.post({"prompt": "a", "max_tokens": 1}, **headers),
        server.post({"prompt": "a", "max_tokens": 1, "stream": True}, **headers),
        server.post({"prompt": ""}, **headers),
    ):
        assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", INVALID_IDS)
def test_a_name_that_is_not_fit_for_a_header_is_replaced(
    server: RunningServer, given: bytes
) -> None:
    name = server.http.get("/health", headers={b"x-request-id": given}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", name)


def test_two_names_are_none(server: RunningServer) -> None:
    response = server.http.get("/health", headers=[("x-request-id", "a"), ("x-request-id", "b")])
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_every_request_gets_another_name(server: RunningServer) -> None:
    assert len({server.http.get("/health").headers["x-request-id"] for _ in range(5)}) == 5
