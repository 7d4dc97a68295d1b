"""Fixtures for the tests of the engine."""

import pytest

from nanovllm.engine.tokenizer import Tokenizer
from tests.support.checkpoints import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)
