"""The pages / and /docs: they load nothing from other hosts, and need no API key."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest

from tests.support.serving import RunningServer, loader


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    with RunningServer(loader(tiny_model), api_keys=["secret"]) as running:
        yield running


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_everything_from_the_server_itself(guarded: RunningServer, path: str) -> None:
    page = guarded.http.get(path)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assets = re.findall(r'<(?:script src|link rel="stylesheet" href)="([^"]+)"', page.text)
    assert assets
    for asset in assets:
        response = guarded.http.get(urljoin(path, asset))
        assert response.status_code == 200
        assert response.content
        assert "immutable" in response.headers["cache-control"]
        assert response.headers["content-type"].startswith(("text/javascript", "text/css"))
    assert not re.findall(r"""(?:src|href)=["'](?:\w+:)?//""", page.text)
    assert "<script>" not in page.text  # refused by the policy


def test_the_document_names_the_key_that_the_open_pages_do_not_need(guarded: RunningServer) -> None:
    document = guarded.http.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {
        "api_key": {"type": "http", "scheme": "bearer"}
    }
    assert guarded.http.get("/v1/models").status_code == 401
