"""The output head: the logits of some rows, or the argmax of each row without storing logits."""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.forward.argmax import (
    make_choose_best,
    make_clear_best,
    make_update_best,
)
from nanovllm.model.kernels.forward.epilogue import make_epilogue
from nanovllm.model.kernels.forward.forward import make_convert_inputs
from nanovllm.model.kernels.forward.matmul import (
    LINEAR_BYTES,
    group_rows,
    make_linear,
    make_panel_accumulate,
)
from nanovllm.model.kernels.forward.phase import ABORTED, end_phase, rows_per_item
from nanovllm.model.kernels.simd.move import linear_at, step_record_at
from nanovllm.model.kernels.simd.scalar import store_int
from nanovllm.model.kernels.step_record import LINEARS_PER_LAYER, ROW_QUANT_BYTES, STORE, best_bytes
from nanovllm.model.kernels.threads.barrier import take_item


@cache
def make_logits(spec: Spec) -> Any:
    """Return logits(record_ptr, thread): logits = final @ token_embedding^T, of `rows` rows."""
    linear = make_linear(spec.target, spec.weights)
    convert_inputs = make_convert_inputs(spec)
    is_float32 = spec.weights == "float32"

    @compiled
    def logits(record_ptr: int, thread: int) -> None:
        record = step_record_at(record_ptr)
        phase, head = record.phases_ptr, record.layers * LINEARS_PER_LAYER
        rows_ptr, stride_bytes = record.final_ptr, record.hidden_stride_bytes
        if not is_float32:
            phase = convert_inputs(
                record, thread, phase, head, record.rows, record.d_model, rows_ptr, stride_bytes
            )
            rows_ptr, stride_bytes = record.inputs_ptr, record.inputs_stride_bytes
        linear(
            record, thread, phase, head, record.rows, rows_ptr, stride_bytes,
            record.logits_ptr, record.logits_stride_bytes, STORE,
        )  # fmt: skip

    return logits


@cache
def make_greedy(spec: Spec) -> Any:
    """Return greedy(record_ptr, thread): argmax_tokens = argmax(logits), of `rows` rows of `final`.

    A row whose logits are not finite has NO_TOKEN (argmax.py).
    """
    convert_inputs = make_convert_inputs(spec)
    clear_rows, argmax_panels = _make_clear_rows(spec), _make_argmax_panels(spec)
    choose_rows = _make_choose_rows(spec)
    is_float32 = spec.weights == "float32"

    @compiled
    def greedy(record_ptr: int, thread: int) -> None:
        record = step_record_at(record_ptr)
        phase = clear_rows(record, thread, record.phases_ptr)
        rows_ptr, stride_bytes = record.final_ptr, record.hidden_stride_bytes
        if not is_float32:
            head = record.layers * LINEARS_PER_LAYER
            phase = convert_inputs(
                record, thread, phase, head, record.rows, record.d_model, rows_ptr, stride_bytes
            )
            rows_ptr, stride_bytes = record.inputs_ptr, record.inputs_stride_bytes
        phase = argmax_panels(record, thread, phase, rows_ptr, stride_bytes)
        choose_rows(record, thread, phase)

    return greedy


def _make_clear_rows(spec: Spec) -> Any:
    clear_best = make_clear_best(spec.target)
    row_bytes = best_bytes(spec.target.lanes)

    @compiled
    def clear_rows(record: Any, thread: int, phase: int) -> int:
        """Clear the best tokens of all threads, those that take no part in this run among them."""
        if phase == ABORTED:
            return ABORTED
        done = 0
        item = take_item(phase)
        while item < record.threads:
            clear_best(record.best_ptr + item * record.rows * row_bytes, record.rows)
            done += 1
            item = take_item(phase)
        return end_phase(record, thread, phase, done, record.threads)

    return clear_rows


def _make_argmax_panels(spec: Spec) -> Any:
    target, width = spec.target, spec.target.panel_width
    panel_accumulate = make_panel_accumulate(target, spec.weights)
    epilogue = make_epilogue(target, spec.weights, kinds=(STORE,))
    update_best = make_update_best(target)
    row_bytes, width_bytes = best_bytes(target.lanes), width * WORD_BYTES

    @compiled
    def argmax_panels(
        record: Any, thread: int, phase: int, in_ptr: int, in_stride_bytes: int
    ) -> int:
        """Keep, for each thread and row, the best token of the panels that the thread takes.

        A thread's panels come in ascending order.
        """
        if phase == ABORTED:
            return ABORTED
        head = linear_at(record.linears_ptr + record.layers * LINEARS_PER_LAYER * LINEAR_BYTES)
        best_ptr = record.best_ptr + thread * record.rows * row_bytes
        accumulators_ptr = record.scratch_ptr + thread * record.scratch_bytes
        panel_bytes = head.steps * width_bytes
        done = 0
        panel = take_item(phase)
        while panel < head.panels:
            next_panel = min(panel + record.threads, head.panels - 1)
            next_ptr = head.weight_ptr + next_panel * panel_bytes
            argmax_panel(
                record, head, panel, in_ptr, in_stride_bytes, best_ptr, accumulators_ptr, next_ptr
            )
            done += 1
            panel = take_item(phase)
        return end_phase(record, thread, phase, done, head.panels)

    @compiled
    def argmax_panel(
        record: Any, head: Any, panel: int, in_ptr: int, in_stride_bytes: int, best_ptr: int,
        accumulators_ptr: int, next_ptr: int,
    ) -> None:  # fmt: skip
        column = panel * width
        logits_ptr = accumulators_ptr - column * WORD_BYTES  # in place: the epilogue adds `column`
        first = 0
        while first < record.rows:
            rows = group_rows(head, record.rows - first)
            panel_accumulate(
                head, panel, in_ptr, in_stride_bytes, first, rows, record.rows,
                accumulators_ptr, next_ptr,
            )  # fmt: skip
            epilogue(
                STORE, accumulators_ptr, rows, head, column,
                record.row_quant_ptr + first * ROW_QUANT_BYTES, logits_ptr, width_bytes,
            )  # fmt: skip
            for row in range(rows):
                row_ptr = accumulators_ptr + row * width_bytes
                row_best_ptr = best_ptr + (first + row) * row_bytes
                update_best(row_ptr, width, column, record.vocab, row_best_ptr)
            first += rows

    return argmax_panels


def _make_choose_rows(spec: Spec) -> Any:
    choose_best = make_choose_best(spec.target)
    row_bytes = best_bytes(spec.target.lanes)

    @compiled
    def choose_rows(record: Any, thread: int, phase: int) -> None:
        """Choose each row's best token over all threads; a run's last phase needs no barrier."""
        if phase == ABORTED:
            return
        size = rows_per_item(record, record.rows)
        item = take_item(phase)
        while item * size < record.rows:
            for row in range(item * size, min(record.rows, (item + 1) * size)):
                best_ptr = record.best_ptr + row * row_bytes
                token = choose_best(best_ptr, record.threads, record.rows * row_bytes)
                store_int(record.argmax_tokens_ptr, row, token)
            item = take_item(phase)

    return choose_rows
