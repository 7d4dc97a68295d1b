"""The tiny model, opened for inspection."""

from pathlib import Path

import pytest

from nanovllm.inspection.observe import InspectedModel


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> InspectedModel:
    return InspectedModel.load(tiny_model)
