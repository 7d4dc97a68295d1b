"""The output head in compiled code: logits of some rows, or the argmax of each without storing logits."""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import PHASE_BYTES
from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.forward.argmax import (
    make_choose_best,
    make_clear_best,
    make_update_best,
)
from nanovllm.model.kernels.forward.epilogue import make_epilogue
from nanovllm.model.kernels.forward.forward import LINEAR_BYTES, make_encode_rows, rows_per_item
from nanovllm.model.kernels.forward.matmul import group_rows, make_panel_sums, make_product
from nanovllm.model.kernels.simd.move import linear_at, step_record_at
from nanovllm.model.kernels.simd.scalar import store_int
from nanovllm.model.kernels.step_record import (
    LINEARS_PER_LAYER,
    NOTES_BYTES,
    STORE,
    WORD_BYTES,
    best_bytes,
)
from nanovllm.model.kernels.threads.barrier import barrier, take_item


@cache
def make_logits(spec: Spec) -> Any:
    """logits(address, thread): the head's scores of `rows` rows of normalised hidden states in `final`, in `logits`."""
    product = make_product(spec.target, spec.weights)
    encode_rows = make_encode_rows(spec)
    is_float32 = spec.weights == "float32"

    @compiled
    def logits(address: int, thread: int) -> None:
        p = step_record_at(address)
        phase = p.phases
        rows, stride = p.final, p.hidden_stride
        if not is_float32:
            number = p.layers * LINEARS_PER_LAYER
            if not encode_rows(p, thread, phase, p.rows, rows, stride, p.d_model, number):
                return
            rows, stride = p.inputs, p.input_stride
        product(
            p, head_of(p), linear_at(p.linears), thread, phase + PHASE_BYTES, rows, stride, p.rows,
            p.input_notes, p.logits, p.logits_stride,
        )  # fmt: skip

    return logits


@cache
def make_greedy(spec: Spec) -> Any:
    """greedy(address, thread): the argmax of each of `rows` rows of `final`, in `words`, or argmax.py's NO_WORD."""
    encode_rows = make_encode_rows(spec)
    clear_rows, argmax_panels = _make_clear_rows(spec), _make_argmax_panels(spec)
    choose_rows = _make_choose_rows(spec)
    is_float32 = spec.weights == "float32"

    @compiled
    def greedy(address: int, thread: int) -> None:
        p = step_record_at(address)
        phase = p.phases
        if not clear_rows(p, thread, phase):
            return
        rows, stride = p.final, p.hidden_stride
        if not is_float32:
            number = p.layers * LINEARS_PER_LAYER
            phase += PHASE_BYTES
            if not encode_rows(p, thread, phase, p.rows, rows, stride, p.d_model, number):
                return
            rows, stride = p.inputs, p.input_stride
        phase += PHASE_BYTES
        if not argmax_panels(p, thread, phase, rows, stride):
            return
        choose_rows(p, thread, phase + PHASE_BYTES)

    return greedy


@compiled
def head_of(p: Any) -> Any:
    """The record of the head, which comes after all layers."""
    return linear_at(p.linears + p.layers * LINEARS_PER_LAYER * LINEAR_BYTES)


def _make_clear_rows(spec: Spec) -> Any:
    clear_best = make_clear_best(spec.target)
    row_bytes = best_bytes(spec.target.lanes)

    @compiled
    def clear_rows(p: Any, thread: int, phase: int) -> bool:
        """No panel has been seen yet by any thread, whether it takes part in this run or not."""
        done = 0
        item = take_item(phase)
        while item < p.threads:
            clear_best(p.best + item * p.rows * row_bytes, p.rows)
            done += 1
            item = take_item(phase)
        return barrier(p.job, phase, thread, done, p.threads)

    return clear_rows


def _make_argmax_panels(spec: Spec) -> Any:
    target, width = spec.target, spec.target.panel_width
    panel_sums = make_panel_sums(target, spec.weights)
    epilogue = make_epilogue(target, spec.weights, kinds=(STORE,))
    update_best = make_update_best(target)
    row_bytes, width_bytes = best_bytes(target.lanes), width * WORD_BYTES

    @compiled
    def argmax_panel(
        p: Any, head: Any, panel: int, rows: int, stride: int, best: int, sums: int, ahead: int
    ) -> None:
        column = panel * width
        in_place = sums - column * WORD_BYTES  # the epilogue adds the column
        first = 0
        while first < p.rows:
            count = group_rows(head, p.rows - first)
            panel_sums(head, panel, rows, stride, first, count, p.rows, sums, ahead)
            notes = p.input_notes + first * NOTES_BYTES
            epilogue(sums, count, head, column, in_place, width_bytes, notes)
            for row in range(count):
                found = best + (first + row) * row_bytes
                update_best(sums + row * width_bytes, width, column, p.vocab, found)
            first += count

    @compiled
    def argmax_panels(p: Any, thread: int, phase: int, rows: int, stride: int) -> bool:
        """Each thread keeps, for each row, the best of the panels that it takes; they come in ascending order."""
        head = head_of(p)
        best, sums = p.best + thread * p.rows * row_bytes, p.scratch + thread * p.scratch_bytes
        panel_bytes = head.steps * width_bytes
        done = 0
        panel = take_item(phase)
        while panel < head.panels:
            ahead = head.weight + min(panel + p.threads, head.panels - 1) * panel_bytes
            argmax_panel(p, head, panel, rows, stride, best, sums, ahead)
            done += 1
            panel = take_item(phase)
        return barrier(p.job, phase, thread, done, head.panels)

    return argmax_panels


def _make_choose_rows(spec: Spec) -> Any:
    choose_best = make_choose_best(spec.target)
    row_bytes = best_bytes(spec.target.lanes)

    @compiled
    def choose_rows(p: Any, thread: int, phase: int) -> None:
        """The best token of each row over all threads."""
        size = rows_per_item(p.rows, p.threads)
        item = take_item(phase)
        while item * size < p.rows:
            for row in range(item * size, min(p.rows, (item + 1) * size)):
                best = p.best + row * row_bytes
                store_int(p.words, row, choose_best(best, p.threads, p.rows * row_bytes))
            item = take_item(phase)

    return choose_rows
