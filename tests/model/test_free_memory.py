"""Loading takes little more memory than what is loaded, and all of it is given back."""

import gc
import os
import platform
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from nanovllm.model import numpy_backend
from nanovllm.model.backend import LoadOptions
from nanovllm.model.kernels import backend as numba_backend
from nanovllm.model.kernels.backend import NumbaBackend
from nanovllm.model.machine import return_freed_memory
from nanovllm.model.numpy_backend import NumpyBackend
from tests.support.checkpoints import write_checkpoint

LAYERS, D_MODEL = 8, 256
FLOAT32_BYTES = LAYERS * 12 * D_MODEL**2 * 4
SHAPE = {"n_embd": D_MODEL, "n_layer": LAYERS, "n_head": 4}

PROGRAM = """
import gc, sys
from pathlib import Path
from nanovllm.model.backend import LoadOptions
from nanovllm.model.kernels.backend import NumbaBackend

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def load(folder):
    return NumbaBackend.load(Path(folder), LoadOptions(num_threads=1))

small, large = sys.argv[1:]
load(small)
gc.collect()
before = resident_bytes()
first = load(large)
loaded = resident_bytes() - before
for _ in range(3):  # one is loaded while the one before is still there
    second = load(large)
    first = second
del first, second
gc.collect()
print(loaded, resident_bytes() - before)
"""


@pytest.fixture(scope="module", params=["F16", "BF16"])
def narrow_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A large model of narrow weights."""
    folder = tmp_path_factory.mktemp("large")
    return write_checkpoint(folder, config=SHAPE, dtype=request.param)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_narrow_checkpoint_is_never_whole_in_float32(
    tmp_path: Path, narrow_checkpoint: Path, quantization: str | None
) -> None:
    """Beside what is packed there are one block in float32 and the temporaries of packing it."""
    small = write_checkpoint(tmp_path / "small")  # what is imported or compiled is not measured
    NumbaBackend.load(
        small, LoadOptions(dtype="bfloat16", quantization=quantization, num_threads=1)
    )
    gc.collect()
    tracemalloc.start()
    try:
        backend = NumbaBackend.load(
            narrow_checkpoint,
            LoadOptions(dtype="bfloat16", quantization=quantization, num_threads=1),
        )
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept > FLOAT32_BYTES / 4, "it was not traced"
    assert peak - kept < FLOAT32_BYTES / 2
    del backend


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps what is freed"
)
def test_overlapping_models_leave_no_memory_behind(tmp_path: Path) -> None:
    folders = [
        str(write_checkpoint(tmp_path / name, config=config))
        for name, config in (("small", {}), ("large", SHAPE))
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    loaded, left = map(int, done.stdout.split())
    assert loaded > FLOAT32_BYTES / 2, "it was not measured"
    assert left < loaded / 3


@pytest.mark.parametrize("kind", [NumbaBackend, NumpyBackend])
def test_a_backend_that_is_dropped_returns_its_memory(
    tmp_path: Path, kind: type[NumbaBackend | NumpyBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = kind.load(write_checkpoint(tmp_path), LoadOptions(num_threads=1))
    returned: list[None] = []
    for module in (numba_backend, numpy_backend):
        monkeypatch.setattr(module, "return_freed_memory", lambda: returned.append(None))
    del backend
    gc.collect()
    assert len(returned) == 1


def test_only_a_c_library_is_asked_and_need_not_have_the_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[None] = []

    def open_nothing(name: None) -> object:
        opened.append(name)
        return object()

    monkeypatch.setattr("nanovllm.model.machine.ctypes.CDLL", open_nothing)
    monkeypatch.setattr(sys, "platform", "linux")
    return_freed_memory()
    assert len(opened) == 1
    monkeypatch.setattr(sys, "platform", "win32")
    return_freed_memory()
    assert len(opened) == 1
