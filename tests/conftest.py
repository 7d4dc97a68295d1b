"""What all tests share: shape annotations that are checked, how hypothesis searches, a tiny model, and both backends."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# From here on every array that enters or leaves a function of these packages must have the shape and dtype that its annotation states.
# It has to happen before they are first imported; the rest of the tests' imports therefore come later.
# The kernels are compiled by Numba and not run by Python; what lays out their arrays is.
_MODEL = [
    f"nanovllm.model.{path.stem}"
    for path in (Path(__file__).parents[1] / "nanovllm" / "model").glob("[a-z]*.py")
]
_ADAPTERS = [
    f"nanovllm.model.kernels.{name}"
    for name in ("backend", "packed_weights", "sampler", "record", "build.packing")
]
install_import_hook([*_MODEL, *_ADAPTERS, "nanovllm.runner"], "beartype.beartype")

from nanovllm.config import BACKENDS  # noqa: E402
from nanovllm.model.kernels.threads.cores import usable_cpus  # noqa: E402
from tests.support.checkpoints import write_tiny_model  # noqa: E402
from tests.support.serving import ENGINE_SETTINGS  # noqa: E402

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # in the background of a shell; what a test starts would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

MAX_WORKERS = (
    4  # each has its own Numba and its own kernels in memory, and threads of its own in many tests
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto` runs the tests in."""
    return min(MAX_WORKERS, usable_cpus())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, begin with the files that have slow ones, so that none is left for the end.

    A process takes a file at a time, in this order: what is compiled and started for a file is then made once.
    """
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the smallest complete model: two blocks of random weights, and its tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend's name in turn, which is in ENGINE_SETTINGS meanwhile: what asks for this fixture runs with both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINE_SETTINGS, "backend", request.param)
        yield request.param
