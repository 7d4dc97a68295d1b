"""The loss of a chunk of rows, and its gradients, without the logits of all rows in memory.

pack_head      pack head^T, for logits, and head, for grad_hidden: once a batch
cross_entropy  logits = hidden @ head^T of a chunk of rows
               softmax of each row, and its gradient in place; pack hidden
               grad_head += grad_logits^T @ hidden; grad_hidden = grad_logits @ head
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import Elements, fold_elements, map_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.matmul.matmul import Matmul, matmul_work, plain_matmul
from nanovllm.training.kernels.matmul.pack import Panels, pack_work
from nanovllm.training.kernels.phases import Work, make_entry, split

_ROWS_PER_ITEM = 8


@compiled
def _transposed_head(record: Any) -> Panels:
    return Panels(
        source_ptr=record.head_ptr,
        is_transposed=True,
        steps=record.d_model,
        columns=record.vocab,
        panels_ptr=record.transposed_panels_ptr,
    )


@compiled
def _head(record: Any) -> Panels:
    return Panels(
        source_ptr=record.head_ptr,
        is_transposed=False,
        steps=record.vocab,
        columns=record.d_model,
        panels_ptr=record.panels_ptr,
    )


def make_pack_head(target: KernelTarget) -> Any:
    """Return the entry pack_head; without `panels_ptr` it packs the transpose alone."""
    return make_entry("pack_head", [pack_work(target, _transposed_head), pack_work(target, _head)])


def make_cross_entropy(target: KernelTarget) -> Any:
    """Return the entry cross_entropy, of one chunk of rows; see NumpyOperations.cross_entropy.

    Without grad_head_ptr, grad_hidden_ptr and hidden_panels_ptr no gradient is computed. It writes
    what the loss of each row consists of: the sum of exp(logit - peak), where the peak is the row's
    largest logit, and the target's logit - peak.
    """

    @compiled
    def logits(record: Any) -> Matmul:
        return plain_matmul(
            rows=record.rows,
            a_ptr=record.hidden_ptr,
            is_transposed=False,
            b=_transposed_head(record),
            out_ptr=record.logits_ptr,
            addend_ptr=0,
        )

    @compiled
    def hidden(record: Any) -> Panels:
        return Panels(
            source_ptr=record.hidden_ptr,
            is_transposed=False,
            steps=record.rows,
            columns=record.d_model,
            panels_ptr=record.hidden_panels_ptr,
        )

    @compiled
    def head_gradient(record: Any) -> Matmul:
        return plain_matmul(
            rows=record.vocab,
            a_ptr=record.logits_ptr,
            is_transposed=True,
            b=hidden(record),
            out_ptr=record.grad_head_ptr,
            addend_ptr=record.grad_head_ptr,
        )

    @compiled
    def hidden_gradient(record: Any) -> Matmul:
        return plain_matmul(
            rows=record.rows,
            a_ptr=record.logits_ptr,
            is_transposed=False,
            b=_head(record),
            out_ptr=record.grad_hidden_ptr,
            addend_ptr=0,
        )

    return make_entry(
        "cross_entropy",
        [matmul_work(target, logits)],
        [_softmax_work(target), pack_work(target, hidden)],
        [matmul_work(target, head_gradient), matmul_work(target, hidden_gradient)],
    )


def _softmax_work(target: KernelTarget) -> Work:
    """Return the work that turns rows of logits into their gradients."""
    softmax = kernel(target, _softmax)

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        first = item * _ROWS_PER_ITEM
        for row in range(first, min(record.rows, first + _ROWS_PER_ITEM)):
            softmax(
                record.logits_ptr + row * record.vocab * WORD_BYTES, record.vocab,
                load_int(record.targets_ptr, row), record.scale_bits,
                record.sums_ptr + row * WORD_BYTES, record.target_logits_ptr + row * WORD_BYTES,
            )  # fmt: skip

    return Work(split("rows", _ROWS_PER_ITEM), compute)


def _softmax(
    v: Vectors, row_ptr: Value, count: Value, target: Value, scale_bits: Value, sum_ptr: Value,
    target_logit_ptr: Value,
) -> None:  # fmt: skip
    """Emit row = scale * (softmax(row) - onehot(target)) for `count` logits."""

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
    scale = v.float_argument(scale_bits)
    factor = scale / v.splat(total)
    map_elements(v, count, [row_ptr], [row_ptr], lambda value: [value * factor])
    probability = v.splat(v.load_scalar(target_ptr))
    v.store((probability - scale).lane(0), target_ptr)
    v.store(total, sum_ptr)
    shifted = (target_logit - peak).lane(0)
    v.store(shifted, target_logit_ptr)
