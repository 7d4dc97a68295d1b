"""The output head: the logits of some rows, or the argmax of each row without storing logits.

The argmax is fused into the matmul. Every thread keeps, for each row, the best score so far in each
lane and its token:

    best   [threads][rows] | score x lanes | token x lanes |

A thread sees a row's tokens in ascending order, and only a larger score replaces one, so of equal
scores the lower token stays. The reduction over lanes and threads compares tokens too. A NaN counts
as infinity, which no score exceeds. A row with either, or with nothing but minus infinity, has
NO_TOKEN instead of an argmax.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled, outlined
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget, Spec
from nanovllm.model.kernels.forward.epilogue import make_epilogue
from nanovllm.model.kernels.forward.forward import make_convert_inputs
from nanovllm.model.kernels.forward.matmul import (
    LINEAR_BYTES,
    make_group_rows,
    make_linear,
    make_panel_accumulate,
)
from nanovllm.model.kernels.simd.kernel import kernel_maker
from nanovllm.model.kernels.simd.memory import (
    linear_at,
    load_float,
    load_i32,
    step_record_at,
    store_int,
)
from nanovllm.model.kernels.simd.rows import Rows, rows_at
from nanovllm.model.kernels.simd.value import I32, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.step_record import (
    LINEARS_PER_LAYER,
    NO_TOKEN,
    ROW_QUANT_BYTES,
    STORE,
    best_bytes,
)
from nanovllm.model.kernels.threads.phase import count_of, make_phase, make_row_phase

_INFINITY = float("inf")


@cache
def make_logits(spec: Spec) -> Any:
    """Return logits(record_ptr, thread): logits = final @ token_embedding^T, of `rows` rows."""
    linear = make_linear(spec.target, spec.weights)
    convert_inputs = make_convert_inputs(spec)
    is_float32 = spec.inputs == "float32"

    @compiled
    def logits(record_ptr: int, thread: int) -> None:
        record = step_record_at(record_ptr)
        phase, head = record.phases_ptr, record.layers * LINEARS_PER_LAYER
        rows = Rows(record.final_ptr, record.hidden_stride_bytes)
        if not is_float32:
            phase = convert_inputs(record, thread, phase, head, record.rows, record.d_model, rows)
            rows = Rows(record.inputs_ptr, record.inputs_stride_bytes)
        out = Rows(record.logits_ptr, record.logits_stride_bytes)
        linear(record, thread, phase, head, record.rows, rows, out, STORE)

    return logits


@cache
def make_greedy(spec: Spec) -> Any:
    """Return greedy(record_ptr, thread, phase) -> next phase.

    argmax_tokens = argmax(logits), of `rows` rows of `final`. A row whose logits are not finite has
    NO_TOKEN.
    """
    convert_inputs = make_convert_inputs(spec)
    clear_rows, argmax_panels = _make_clear_rows(spec), _make_argmax_panels(spec)
    choose_rows = _make_choose_rows(spec)
    is_float32 = spec.inputs == "float32"

    @outlined
    def greedy(record_ptr: int, thread: int, phase: int) -> int:
        record = step_record_at(record_ptr)
        phase = clear_rows(record, thread, phase)
        rows = Rows(record.final_ptr, record.hidden_stride_bytes)
        if not is_float32:
            head = record.layers * LINEARS_PER_LAYER
            phase = convert_inputs(record, thread, phase, head, record.rows, record.d_model, rows)
            rows = Rows(record.inputs_ptr, record.inputs_stride_bytes)
        phase = argmax_panels(record, thread, phase, rows)
        return int(choose_rows(record, thread, phase))

    return greedy


def _make_clear_rows(spec: Spec) -> Any:
    clear_best = make_clear_best(spec.target)
    row_bytes = best_bytes(spec.target.lanes)

    @compiled
    def clear_rows(record: Any, _thread: int, item: int) -> None:
        """Clear the best tokens of all threads, those that take no part in this run among them."""
        clear_best(record.best_ptr + item * record.rows * row_bytes, record.rows)

    return make_phase(count_of("threads"), clear_rows)


def _make_argmax_panels(spec: Spec) -> Any:
    """Return argmax_panels(record, thread, phase, inputs) -> next phase.

    It keeps, for each thread and row, the best token of the panels that the thread takes. A
    thread's panels come in ascending order.
    """
    target, width = spec.target, spec.target.panel_width
    panel_accumulate = make_panel_accumulate(target, spec.weights)
    group_rows = make_group_rows(target, spec.weights)
    epilogue = make_epilogue(target, spec.weights, kinds=(STORE,))
    update_best = make_update_best(target)
    row_bytes, width_bytes = best_bytes(target.lanes), width * WORD_BYTES

    @compiled
    def head_of(record: Any) -> Any:
        return linear_at(record.linears_ptr + record.layers * LINEARS_PER_LAYER * LINEAR_BYTES)

    @compiled
    def count_panels(record: Any, _inputs: Any) -> int:
        return head_of(record).panels

    @compiled
    def argmax_panel(record: Any, thread: int, panel: int, inputs: Any) -> None:
        head = head_of(record)
        next_panel = min(panel + record.threads, head.panels - 1)
        next_ptr = head.weight_ptr + next_panel * head.steps * width_bytes
        accumulators_ptr = record.scratch_ptr + thread * record.scratch_bytes
        logits = rows_at(accumulators_ptr, width_bytes)  # they take the accumulators' place
        column, all_rows = panel * width, record.rows
        wide_ptr = record.wide_ptr + thread * record.wide_bytes
        first = 0
        while first < all_rows:
            rows = group_rows(head, all_rows, first)
            panel_accumulate(head, panel, inputs, first, rows, all_rows, logits, next_ptr, wide_ptr)
            row_quant_ptr = record.row_quant_ptr + first * ROW_QUANT_BYTES
            epilogue(STORE, logits, rows, head, column, row_quant_ptr, logits)
            best_ptr = record.best_ptr + (thread * all_rows + first) * row_bytes
            for row in range(rows):
                logits_ptr = logits.ptr + row * width_bytes
                update_best(logits_ptr, width, column, record.vocab, best_ptr + row * row_bytes)
            first += rows

    return make_phase(count_panels, argmax_panel)


def _make_choose_rows(spec: Spec) -> Any:
    choose_best = make_choose_best(spec.target)
    row_bytes = best_bytes(spec.target.lanes)

    @compiled
    def choose_row(record: Any, _thread: int, row: int) -> None:
        """Choose a row's best token over all threads."""
        best_ptr = record.best_ptr + row * row_bytes
        token = choose_best(best_ptr, record.threads, record.rows * row_bytes)
        store_int(record.argmax_tokens_ptr, row, token)

    return make_row_phase(count_of("rows"), choose_row)


@kernel_maker()
def make_clear_best(v: Vectors, best_ptr: Value, rows: Value) -> None:
    """Return clear_best(best_ptr, rows), which forgets the best tokens of a thread's rows."""
    lanes = v.lanes
    row_bytes = best_bytes(lanes)
    with v.range(rows) as i:
        row_ptr = best_ptr + i * row_bytes
        v.store(v.constant(-_INFINITY), row_ptr)
        v.store(v.integers(0), row_ptr, lanes * WORD_BYTES)


@kernel_maker()
def make_update_best(
    v: Vectors, scores_ptr: Value, columns: Value, first_token: Value, vocab: Value,
    best_ptr: Value,
) -> None:  # fmt: skip
    """Return update_best, which takes the logits of one row and one panel.

    scores_ptr   float32 [columns], whole vectors
    columns      width of the panel
    first_token  token of the first column
    vocab        size of the vocabulary; columns from there on are padding
    best_ptr     the row's best scores and tokens
    """
    lanes = v.lanes
    tokens_left = vocab - first_token
    lane_numbers = v.lane_numbers()
    best = v.load(best_ptr)
    best_token = v.load(best_ptr, lanes * WORD_BYTES).bitcast(I32)

    def vector(i: Value, carried: list[Value]) -> list[Value]:
        best, best_token = carried
        score = v.load(v.element(scores_ptr, i))
        is_sound = score < _INFINITY
        score = v.where(is_sound, score, _INFINITY)
        is_token = v.first_lanes(tokens_left - i)
        score = v.where(is_token, score, -_INFINITY)
        is_better = score > best
        first = v.splat((first_token + i).trunc(I32))
        token = first + lane_numbers
        return [v.where(is_better, score, best), v.where(is_better, token, best_token)]

    best, best_token = v.loop(columns, lanes, [best, best_token], vector)
    v.store(best, best_ptr)
    v.store(best_token, best_ptr, lanes * WORD_BYTES)


def make_choose_best(target: KernelTarget) -> Any:
    """Return choose_best(best_ptr, threads, thread_bytes) -> token, the argmax of one row.

    best_ptr      the row's best scores and tokens of the first thread
    threads       number of threads
    thread_bytes  bytes from one thread's memory to the next thread's
    """
    lanes = target.lanes

    @compiled
    def choose_best(best_ptr: int, threads: int, thread_bytes: int) -> int:
        best_token = NO_TOKEN
        best = load_float(best_ptr, 0)
        for thread in range(threads):
            thread_ptr = best_ptr + thread * thread_bytes
            for lane in range(lanes):
                score, token = load_float(thread_ptr, lane), load_i32(thread_ptr, lanes + lane)
                is_first = best_token == NO_TOKEN
                if is_first or score > best or (score == best and token < best_token):
                    best, best_token = score, token
        return best_token if abs(best) < _INFINITY else NO_TOKEN

    return choose_best
