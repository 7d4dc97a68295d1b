"""Fixtures for the tests of the engine."""

from dataclasses import replace
from typing import Any

import pytest

from nanovllm.config import BACKENDS, EngineConfig
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


NUMPY = EngineConfig(
    batch_invariant=True, block_size=8, num_blocks=64, max_num_batched_tokens=64, max_num_seqs=8
)
KINDS: dict[str, dict[str, Any]] = {
    **{backend: {"backend": backend} for backend in BACKENDS},
    "bfloat16": {"backend": "numba", "dtype": "bfloat16"},
    "int8 and cache": {"backend": "numba", "quantization": "int8", "kv_cache_dtype": "int8"},
}


@pytest.fixture(scope="module", params=KINDS)
def exact(request: pytest.FixtureRequest) -> EngineConfig:
    """Settings whose bits do not depend on the batch: all backends, types of weights and cache."""
    return replace(NUMPY, **KINDS[request.param])
