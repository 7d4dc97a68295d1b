"""A server with controls, shared by the tests of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engine_state import STALLED_S
from tests.support.serving import RunningServer, loader


@pytest.fixture(scope="module")
def controlled(tiny_model: Path) -> Iterator[RunningServer]:
    """A server with controls, few slots and few blocks, and a short limit for stalled clients."""
    load = loader(tiny_model, num_blocks=24, max_num_seqs=4)
    with RunningServer(load, inspector_controls=True, stalled_client_s=STALLED_S) as running:
        yield running
