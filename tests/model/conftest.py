"""A fixture for tests of values that are checked while the program runs."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture(scope="module")
def checked_by_the_config_alone() -> Iterator[None]:
    """Pass values of wrong types, as files do, past the annotations that the tests enforce."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", value=True)
    yield
    jaxtyping.config.update("jaxtyping_disable", value=before)
