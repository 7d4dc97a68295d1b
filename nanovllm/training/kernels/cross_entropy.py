"""The loss of a chunk of rows, and its gradients, without the logits of all rows in memory.

pack_head      pack head^T, for logits, and head, for grad_hidden: once a batch
cross_entropy  logits = hidden @ head^T of a chunk of rows
               softmax of each row, and its gradient in place; pack hidden
               grad_head += grad_logits^T @ hidden; grad_hidden = grad_logits @ head
"""

from typing import Any

from nanovllm.model.kernels.build.layout import INT_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import Elements, fold_elements, map_elements
from nanovllm.model.kernels.simd.kernel import Record, kernel
from nanovllm.model.kernels.simd.value import I64, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.matmul.matmul import matmul_work, plain_matmul
from nanovllm.training.kernels.matmul.pack import pack_work, panels_of
from nanovllm.training.kernels.phases import Work, item_rows, make_operation, split

_ROWS_PER_ITEM = 8


_TRANSPOSED_HEAD = panels_of(
    "head_ptr", steps="d_model", columns="vocab", panels="transposed_panels_ptr", is_transposed=True
)
_HEAD = panels_of("head_ptr", steps="vocab", columns="d_model", panels="panels_ptr")
_HIDDEN = panels_of("hidden_ptr", steps="rows", columns="d_model", panels="hidden_panels_ptr")


def make_pack_head(target: KernelTarget) -> Any:
    """Return the entry pack_head; without `panels_ptr` it packs the transpose alone."""
    return make_operation(
        "pack_head", [pack_work(target, _TRANSPOSED_HEAD), pack_work(target, _HEAD)]
    )


def make_cross_entropy(target: KernelTarget) -> Any:
    """Return the entry cross_entropy, of one chunk of rows; see NumpyOperations.cross_entropy.

    Without grad_head_ptr, grad_hidden_ptr and hidden_panels_ptr no gradient is computed. It writes
    the two parts of each row's loss: the sum of exp(logit - peak), where the peak is the row's
    largest logit, and the target's logit - peak.
    """
    logits = plain_matmul("hidden_ptr", _TRANSPOSED_HEAD, "logits_ptr", rows="rows")
    head_gradient = plain_matmul(
        "logits_ptr", _HIDDEN, "grad_head_ptr", rows="vocab", is_transposed=True, accumulates=True
    )
    hidden_gradient = plain_matmul("logits_ptr", _HEAD, "grad_hidden_ptr", rows="rows")
    softmax = Work(split("rows", _ROWS_PER_ITEM), kernel(target, _softmax))
    return make_operation(
        "cross_entropy",
        [matmul_work(target, logits)],
        [softmax, pack_work(target, _HIDDEN)],
        [matmul_work(target, head_gradient), matmul_work(target, hidden_gradient)],
    )


def _softmax(v: Vectors, record: Record, _thread: Value, item: Value) -> None:
    """Emit row = scale * (softmax(row) - onehot(target)) of an item's rows of logits.

    A row whose target is IGNORED, which is negative, has a scale of 0.
    """
    with item_rows(v, record, item, _ROWS_PER_ITEM) as row:
        _softmax_row(v, record, row)


def _softmax_row(v: Vectors, record: Record, row: Value) -> None:
    count = record.vocab
    row_ptr = v.element(record.logits_ptr, row * count)
    target = v.load_as(I64, record.targets_ptr + row * INT_BYTES)
    is_ignored = target < 0
    target = v.where(is_ignored, 0, target)

    def take_larger(logits: Elements, peaks: list[Value]) -> list[Value]:
        return [v.maximum(peaks[0], logits.load(row_ptr))]

    def exponentiate(logits: Elements, totals: list[Value]) -> list[Value]:
        value = v.exp(logits.load(row_ptr) - peak)
        logits.store(value, row_ptr)
        return [totals[0] + logits.without_copies(value)]

    peaks = fold_elements(v, count, [v.constant(-float("inf"))], take_larger)
    peak = v.splat(v.largest(peaks[0]))
    target_ptr = v.element(row_ptr, target)
    target_logit = v.splat(v.load_scalar(target_ptr))
    sums = fold_elements(v, count, [v.constant(0.0)], exponentiate)
    total = v.sum(sums[0])
    scale = v.splat(v.where(is_ignored, 0.0, record.scale))
    factor = scale / v.splat(total)
    map_elements(v, count, [row_ptr], [row_ptr], lambda value: [value * factor])
    probability = v.splat(v.load_scalar(target_ptr))
    v.store((probability - scale).lane(0), target_ptr)
    v.store(total, v.element(record.sums_ptr, row))
    v.store((target_logit - peak).lane(0), v.element(record.target_logits_ptr, row))
