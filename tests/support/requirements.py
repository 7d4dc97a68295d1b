"""Programs and packages that tests need beside the package's own dependencies."""

import os
import sys
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it in CI on Linux, where .ci/run installs what tests need."""
    if os.environ.get("CI") and sys.platform == "linux":
        pytest.fail(f"{what}, but .ci/run installs it", pytrace=False)
    pytest.skip(what)
