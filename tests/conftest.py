"""What all tests share: checked shapes, hypothesis's settings, a tiny model, and both backends."""

import gc
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# BLAS and OpenMP have one thread, also in the processes that tests start: more wait for each other
# where several processes run tests. NumPy reads this when it is imported.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from tests.support.shape_checks import install_shape_checks  # noqa: E402

# From here on, arrays that enter or leave a function of these packages must have the annotated
# shape and dtype. This must precede their first import, so the other imports come later.
# The kernels are compiled by Numba and not run by Python; what lays out their arrays is.
_MODULES = [
    f"nanovllm.{package.replace('/', '.')}.{path.stem}"
    for package in (
        *("model", "inspection"),
        *("training", "training/data", "training/network", "training/run"),
    )
    for path in (Path(__file__).parents[1] / "nanovllm" / package).glob("[a-z]*.py")
]
_MODULES.remove("nanovllm.training.config")  # checks the types of its settings itself
_ADAPTERS = [
    f"nanovllm.model.kernels.{name}"
    for name in ("backend", "packed_weights", "sampler", "record", "build.packing")
]
install_shape_checks([*_MODULES, *_ADAPTERS, "nanovllm.evaluation.scoring", "nanovllm.runner"])

from nanovllm.config import BACKENDS  # noqa: E402
from nanovllm.model.machine import usable_cpus  # noqa: E402
from tests.support.browser import chromium  # noqa: E402
from tests.support.checkpoints import write_tiny_model  # noqa: E402
from tests.support.serving import ENGINE_SETTINGS  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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
    """How many processes `-n auto` runs the tests in: one more than CPUs, as tests often wait."""
    return min(MAX_WORKERS, usable_cpus() + 1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the files with slow tests first, the slowest first, in a parallel run.

    A process takes a file at a time, in this order. What a file needs is compiled and started once.
    """
    if hasattr(config, "workerinput"):
        seconds: Counter[Path] = Counter()
        for item in items:
            for mark in item.iter_markers("slow"):
                seconds[item.path] = max(seconds[item.path], *mark.args)
        items.sort(key=lambda item: -seconds[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for garbage only among later objects: those of thousands of tests stay."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the smallest model: two blocks of random weights, and a tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file with the text that small training runs learn."""
    from tests.support.training_runs import TEXT

    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium, until the end of the file: other files may call asyncio.run."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each backend, which is set in ENGINE_SETTINGS, and give its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINE_SETTINGS, "backend", request.param)
        yield request.param
