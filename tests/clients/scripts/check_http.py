"""Programs that speak plain HTTP: curl, http.client, requests, httpx and aiohttp."""

import http.client
import json
import subprocess
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import requests
from checks import KEY, PROMPT, URL, V1, works

HEADERS = {"Authorization": f"Bearer {KEY}"}
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8}
PATH = f"{V1}/completions"


def curl(*arguments: str) -> str:
    return subprocess.run(
        ["curl", "-sS", "--max-time", "60", "-H", f"Authorization: Bearer {KEY}", *arguments],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


@works
def curl_completes() -> None:
    answer = curl(PATH, "-H", "Content-Type: application/json", "-d", json.dumps(BODY))
    assert json.loads(answer)["choices"]


@works
def curl_streams() -> None:
    sent = json.dumps({**BODY, "stream": True})
    assert curl("-N", PATH, "--json", sent).rstrip().endswith("data: [DONE]")


@works
def curl_sends_chunks_and_expects_100() -> None:
    for header in ("Transfer-Encoding: chunked", "Expect: 100-continue"):
        answer = curl(
            PATH, "-H", header, "-H", "Content-Type: application/json", "-d", json.dumps(BODY)
        )
        assert json.loads(answer)["choices"]


@works
def curl_asks_for_the_head() -> None:
    assert curl("--head", f"{URL}/health").startswith("HTTP/1.1 200")


@works
def http_client_keeps_its_connection() -> None:
    connection = http.client.HTTPConnection(urlsplit(URL).netloc, timeout=60)
    sockets = set()
    for stream in (False, True, False):
        content = json.dumps({**BODY, "stream": stream})
        connection.request(
            "POST", "/v1/completions", content, {**HEADERS, "Content-Type": "application/json"}
        )
        sockets.add(connection.sock)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
    assert len(sockets) == 1
    connection.close()


@works
def requests_completes_and_streams() -> None:
    with requests.Session() as session:
        session.headers.update(HEADERS)
        assert session.post(PATH, json=BODY, timeout=60).json()["choices"]
        with session.post(PATH, json={**BODY, "stream": True}, timeout=60, stream=True) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == b"data: [DONE]"
        assert session.get(f"{URL}/health", timeout=60).ok


@works
def httpx_completes_and_streams() -> None:
    with httpx.Client(headers=HEADERS, timeout=60) as opened:
        assert opened.post(PATH, json=BODY).json()["choices"]
        with opened.stream("POST", PATH, json={**BODY, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"


@works
async def aiohttp_completes_and_streams() -> None:
    async with aiohttp.ClientSession(headers=HEADERS) as session:
        async with session.post(PATH, json=BODY) as answer:
            assert (await answer.json())["choices"]
        async with session.post(PATH, json={**BODY, "stream": True}) as answer:
            lines = [line async for line in answer.content]
        assert lines[-2] == b"data: [DONE]\n"


@works
def whole_numbers_written_as_floats() -> None:
    answer = requests.post(PATH, json={**BODY, "max_tokens": 8.0}, headers=HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
