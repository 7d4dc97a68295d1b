"""Compiled operations, loaded once for all tests."""

from collections.abc import Iterator

import pytest

from nanovllm.training.kernels.operations import CompiledOperations


@pytest.fixture(scope="session")
def compiled() -> Iterator[list[CompiledOperations]]:
    """Return operations on 1, 2 and 3 threads."""
    operations = [CompiledOperations(threads) for threads in (1, 2, 3)]
    yield operations
    for each in operations:
        each.close()
