"""Linear layers of any target and type of weights, called with arrays."""

from functools import cache
from threading import Thread

import numpy as np

from nanovllm.model.kernels.build.layout import JOB, PHASE_BYTES, THREAD_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros, pack_panels, pack_rows
from nanovllm.model.kernels.build.target import PER_WORD, KernelTarget
from nanovllm.model.kernels.step_record import (
    LINEAR_RECORD,
    PIECE_WORDS,
    RESIDUAL,
    ROW_QUANT_BYTES,
    STEP_RECORD,
    STORE,
)
from nanovllm.model.kernels.threads.os_wait import prepare_lock
from tests.support.arrays import as_int16_inputs, widened
from tests.support.kernel_entries import linear_kernel

RESIDUAL_VALUE, BESIDE = np.float32(3.0), np.float32(-7.0)


class Product:
    """A linear layer of one type of weights, called with arrays."""

    def __init__(self, target: KernelTarget, kind: str) -> None:
        self.target, self.kind = target, kind
        self.run = linear_kernel(target, kind)
        self._packed: tuple[np.ndarray, np.ndarray] | None = (
            None  # the last call's weight and its panels: the next call often has the same one
        )

    def _panels(self, weight: np.ndarray) -> np.ndarray:
        if self._packed is None or self._packed[0] is not weight:
            steps = self.target.panel_steps(self.kind, weight.shape[0])
            self._packed = weight, pack_panels(weight, self.target.panel_width, steps=steps)
        return self._packed[1]

    def __call__(
        self,
        rows: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
        *,
        threads: int = 1,
        epilogue: int = STORE,
        **extra: np.ndarray,
    ) -> np.ndarray:
        """Compute by `threads` threads; `extra` are arrays of the layer's record and `row_quant`.

        The rows have the type of the weights, and are converted to what the layer takes.
        The outputs that the RESIDUAL epilogue adds to are all RESIDUAL_VALUE.
        """
        width = self.target.panel_width
        inputs, block = self.target.input_type(self.kind), self.target.row_block(self.kind)
        if inputs != self.kind:
            rows = widened(rows) if inputs == "float32" else as_int16_inputs(rows)
        row_quant = extra.pop(
            "row_quant", np.zeros((rows.shape[0], ROW_QUANT_BYTES // 4), dtype=np.float32)
        ).copy()
        if self.kind == "int8":
            rows = rows - rows.dtype.type(self.target.int8_offset)
            row_quant.view(np.int32)[:, 1] -= self.target.int8_offset
        panels, biases, job = (
            self._panels(weight),
            pack_rows([bias], width),
            aligned_zeros((JOB.itemsize + threads * THREAD_BYTES + PHASE_BYTES) // 4),
        )
        scratch, linear, record = (
            aligned_zeros(threads * (block + PIECE_WORDS) * width),
            np.zeros(1, dtype=LINEAR_RECORD),
            np.zeros(1, dtype=STEP_RECORD),
        )
        linear["steps"], linear["panels"] = panels.shape[1], panels.shape[0]
        linear["weight_ptr"], linear["bias_ptr"] = panels.ctypes.data, biases.ctypes.data
        if "outlier_columns" in extra:
            linear["outliers"] = extra["outlier_columns"].size
        for name, array in extra.items():
            linear[f"{name}_ptr"] = array.ctypes.data
        record["threads"], record["scratch_ptr"] = threads, scratch.ctypes.data
        record["scratch_bytes"] = block * width * WORD_BYTES
        record["wide_ptr"] = scratch.ctypes.data + threads * block * width * WORD_BYTES
        record["wide_bytes"] = PIECE_WORDS * width * WORD_BYTES
        record["linears_ptr"], record["row_quant_ptr"] = linear.ctypes.data, row_quant.ctypes.data
        record["job_ptr"] = job.ctypes.data
        record["phases_ptr"] = job.ctypes.data + JOB.itemsize + threads * THREAD_BYTES
        prepare_lock(job.ctypes.data)
        inputs_padded = panels.shape[1] * PER_WORD[self.kind]
        padded = np.zeros((rows.shape[0], inputs_padded), dtype=rows.dtype)
        padded[:, : rows.shape[1]] = rows
        out = aligned_zeros(rows.shape[0] * (biases.shape[1] + 16)).reshape(rows.shape[0], -1)
        out[:], out[:, -16:] = RESIDUAL_VALUE if epilogue == RESIDUAL else 0, BESIDE

        values = np.array(
            [
                record.ctypes.data, rows.shape[0], padded.ctypes.data, padded.strides[0],
                out.ctypes.data, out.strides[0], epilogue,
            ],
            dtype=np.int64,
        )  # fmt: skip

        def share(thread: int) -> None:
            assert self.run(values.ctypes.data, thread) == 0

        others = [Thread(target=share, args=(number,)) for number in range(1, threads)]
        for other in others:
            other.start()
        share(0)
        for other in others:
            other.join(20)
            assert not other.is_alive()
        assert (out[:, -16:] == BESIDE).all(), "rows are as long as all panels, and no longer"
        return out[:, :-16]


class Products(dict[str, Product]):
    """The linear layers of a target by type of weights, each compiled when it is first used."""

    def __init__(self, target: KernelTarget) -> None:
        super().__init__()
        self._target = target

    def __missing__(self, kind: str) -> Product:
        self[kind] = Product(self._target, kind)
        return self[kind]


@cache
def products_of(target: KernelTarget) -> Products:
    return Products(target)
