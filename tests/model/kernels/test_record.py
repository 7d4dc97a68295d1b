"""A record takes addresses only of arrays that compiled code can read: it sees no types."""

import numpy as np
import pytest

from nanovllm.model.kernels.record import KernelMemory
from nanovllm.model.kernels.step_record import STEP_DTYPES, STEP_RECORD


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("hidden", np.zeros((2, 4), dtype=np.float64)),
        ("hidden", np.zeros((2, 4), dtype=np.int32)),
        ("hidden", np.zeros((4, 2), dtype=np.float32).T),
        ("hidden", np.zeros((2, 8), dtype=np.float32)[:, ::2]),
        ("hidden", np.zeros(4, dtype=">f4")),
        ("slots", np.zeros(4, dtype=np.int32)),
        ("slots", np.zeros(4, dtype=np.float64)),
        ("token_embedding", np.zeros((2, 4), dtype=np.float16)),
        ("linears", np.zeros(4, dtype=np.int64)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.dtype),
)
def test_an_array_that_kernels_would_misread_is_refused(name: str, array: np.ndarray) -> None:
    memory = KernelMemory(STEP_RECORD, STEP_DTYPES)
    with pytest.raises(TypeError, match=name):
        memory.bind(**{name: array})
    assert memory[name] == 0
    assert name not in memory.arrays


def test_an_array_that_kernels_can_read_is_kept_with_its_address() -> None:
    memory = KernelMemory(STEP_RECORD, STEP_DTYPES)
    dtypes = {"hidden": np.float32, "slots": np.int64, "token_embedding": np.uint16}
    arrays = {name: np.zeros((2, 4), dtype=np.dtype(dtype)) for name, dtype in dtypes.items()}
    memory.bind(**arrays)
    for name, array in arrays.items():
        assert memory.arrays[name] is array
        assert memory[name] == array.ctypes.data
