"""Fixtures for the tests of the engine."""

import pytest

from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.tokenizer import Tokenizer
from tests.support.checkpoints import write_tokenizer
from tests.support.processing import make_input_processor


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def input_processor(tokenizer: Tokenizer) -> InputProcessor:
    """An input processor without a seed; requests are served by arrival."""
    return make_input_processor(tokenizer)
