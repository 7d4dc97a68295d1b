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
from nanovllm.model.kernels.simd.move import load_int, record_at
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.threads.barrier import take_item
from nanovllm.model.kernels.threads.phase import ABORTED, end_phase
from nanovllm.training.kernels.matmul.matmul import make_matmul
from nanovllm.training.kernels.matmul.pack import make_pack_panel
from nanovllm.training.kernels.records import LINEAR, RECORDS, SCRATCH_FLOATS

_head_record_at = record_at(RECORDS["pack_head"])
_record_at = record_at(RECORDS["cross_entropy"])
_SCRATCH_BYTES = SCRATCH_FLOATS * WORD_BYTES
_ROWS_PER_ITEM = 8


def make_pack_head(target: KernelTarget) -> Any:
    """Return the entry pack_head(record_ptr, thread)."""
    width = target.panel_width
    pack_panel = make_pack_panel(target)

    @compiled
    def pack_head(record_ptr: int, thread: int) -> None:
        record = _head_record_at(record_ptr)
        vocab, d_model = record.vocab, record.d_model
        vocab_panels, panels = (vocab + width - 1) // width, 0
        if record.panels_ptr != 0:
            panels = (d_model + width - 1) // width
        item = take_item(record.phases_ptr)
        while item < vocab_panels + panels:
            is_transposed = 1 if item < vocab_panels else 0
            panel, steps, columns = item, d_model, vocab
            panel_ptr = record.transposed_panels_ptr + panel * steps * width * WORD_BYTES
            if is_transposed == 0:
                panel, steps, columns = item - vocab_panels, vocab, d_model
                panel_ptr = record.panels_ptr + panel * steps * width * WORD_BYTES
            pack_panel(
                record.head_ptr, d_model * WORD_BYTES, is_transposed, steps, columns, panel,
                panel_ptr,
            )  # fmt: skip
            item = take_item(record.phases_ptr)

    return pack_head


def make_cross_entropy(target: KernelTarget) -> Any:
    """Return the entry cross_entropy(record_ptr, thread), of one chunk of rows.

    See NumpyOperations.cross_entropy_backward. Without grad_head_ptr no gradient is computed. It
    writes what the loss of each row consists of: the sum of exp(logit - peak), where the peak is
    the row's largest logit, and the target's logit - peak.
    """
    compute_logits = _make_compute_logits(target)
    compute_softmax = _make_compute_softmax(target)
    multiply_gradients = _make_multiply_gradients(target)

    @compiled
    def cross_entropy(record_ptr: int, thread: int) -> None:
        record = _record_at(record_ptr)
        scratch_ptr = record.scratch_ptr + thread * _SCRATCH_BYTES
        phase = compute_logits(record, thread, record.phases_ptr, scratch_ptr)
        if phase != ABORTED:
            phase = compute_softmax(record, thread, phase)
        if phase != ABORTED and record.grad_head_ptr != 0:
            multiply_gradients(record, phase, scratch_ptr)

    return cross_entropy


def _make_compute_logits(target: KernelTarget) -> Any:
    """Return compute_logits(record, thread, phase, scratch_ptr), the first phase."""
    count_items, multiply = make_matmul(target)

    @compiled
    def compute_logits(record: Any, thread: int, phase: int, scratch_ptr: int) -> int:
        items = count_items(record.rows, record.vocab, record.threads, False)
        done = 0
        item = take_item(phase)
        while item < items:
            multiply(
                record.threads, item, record.rows, record.vocab, record.d_model,
                record.hidden_ptr, record.d_model * WORD_BYTES, WORD_BYTES,
                record.transposed_panels_ptr,
                record.logits_ptr, 0, 0, LINEAR, 0, scratch_ptr,
            )  # fmt: skip
            done += 1
            item = take_item(phase)
        return int(end_phase(record, thread, phase, done, items))

    return compute_logits


def _make_compute_softmax(target: KernelTarget) -> Any:
    """Return compute_softmax(record, thread, phase), the second phase."""
    width = target.panel_width
    pack_panel = make_pack_panel(target)
    softmax = kernel(target, _softmax)

    @compiled
    def compute_softmax(record: Any, thread: int, phase: int) -> int:
        rows, vocab, d_model = record.rows, record.vocab, record.d_model
        row_items = (rows + _ROWS_PER_ITEM - 1) // _ROWS_PER_ITEM
        items = row_items
        if record.grad_head_ptr != 0:
            items += (d_model + width - 1) // width
        done = 0
        item = take_item(phase)
        while item < items:
            if item < row_items:
                first = item * _ROWS_PER_ITEM
                for row in range(first, min(rows, first + _ROWS_PER_ITEM)):
                    softmax(
                        record.logits_ptr + row * vocab * WORD_BYTES, vocab,
                        load_int(record.targets_ptr, row), record.scale_bits,
                        record.sums_ptr + row * WORD_BYTES,
                        record.target_logits_ptr + row * WORD_BYTES,
                    )  # fmt: skip
            else:
                panel = item - row_items
                pack_panel(
                    record.hidden_ptr, d_model * WORD_BYTES, 0, rows, d_model, panel,
                    record.hidden_panels_ptr + panel * rows * width * WORD_BYTES,
                )  # fmt: skip
            done += 1
            item = take_item(phase)
        return int(end_phase(record, thread, phase, done, items))

    return compute_softmax


def _make_multiply_gradients(target: KernelTarget) -> Any:
    """Return multiply_gradients(record, phase, scratch_ptr), the last phase."""
    count_items, multiply = make_matmul(target)

    @compiled
    def multiply_gradients(record: Any, phase: int, scratch_ptr: int) -> None:
        rows, vocab, d_model = record.rows, record.vocab, record.d_model
        head_items = count_items(vocab, d_model, record.threads, True)
        items = head_items + count_items(rows, d_model, record.threads, False)
        item = take_item(phase)
        while item < items:
            if item < head_items:
                multiply(
                    record.threads, item, vocab, d_model, rows,
                    record.logits_ptr, WORD_BYTES, vocab * WORD_BYTES, record.hidden_panels_ptr,
                    record.grad_head_ptr, 0, 0, LINEAR, record.grad_head_ptr,
                    scratch_ptr,
                )  # fmt: skip
            else:
                multiply(
                    record.threads, item - head_items, rows, d_model, vocab,
                    record.logits_ptr, vocab * WORD_BYTES, WORD_BYTES, record.panels_ptr,
                    record.grad_hidden_ptr, 0, 0, LINEAR, 0, scratch_ptr,
                )  # fmt: skip
            item = take_item(phase)

    return multiply_gradients


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
