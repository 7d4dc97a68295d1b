"""A server with keys, and the lines of request logs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.engine.chat.template import ChatTemplate
from tests.support.guarded import KEYS, LIMIT, PAGE
from tests.support.log_lines import LogLines
from tests.support.serving import RunningServer, loader


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server with keys, a small limit, and two web pages that may use it."""
    origins = (PAGE, "http://localhost:3000")
    with RunningServer(
        loader(tiny_model),
        api_keys=KEYS,
        max_body_bytes=LIMIT,
        allowed_origins=origins,
        chat_template=ChatTemplate("{{ messages[0].content }}", "the test's"),
    ) as running:
        yield running


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> LogLines:
    """What is logged during the test."""
    return LogLines(caplog)
