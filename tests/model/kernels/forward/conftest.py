"""The targets that kernels are compiled for."""

import pytest

from nanovllm.model.kernels.build.target import KernelTarget
from tests.support.targets import WIDTHS, name_of


@pytest.fixture(scope="module", params=WIDTHS, ids=name_of)
def target(request: pytest.FixtureRequest) -> KernelTarget:
    """Each vector width."""
    kernel_target = request.param
    assert isinstance(kernel_target, KernelTarget)
    return kernel_target
