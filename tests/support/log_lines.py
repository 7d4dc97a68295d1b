"""The lines of request logs."""

import json
import logging
from typing import Any

import pytest

from tests.support.serving import wait_until


class LogLines:
    """The lines that the servers of this process have logged since the test began."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="nanovllm.requests")
        self._caplog = caplog

    def texts(self) -> list[str]:
        """All of them, as they were written."""
        return [
            record.getMessage()
            for record in self._caplog.records
            if record.name == "nanovllm.requests"
        ]

    def about(self, request_id: str) -> dict[str, Any]:
        """Wait for the only line about a request, which is written after the answer's last byte."""
        wait_until(lambda: any(request_id in text for text in self.texts()))
        (found,) = [
            line for line in map(json.loads, self.texts()) if line["request_id"] == request_id
        ]
        return dict(found)
