"""Argmax fused into the matmul of the output head: logits are never stored.

Every thread keeps, for each row, the best score so far in each lane and its token:

    best   [threads][rows] | score x lanes | token x lanes |

A thread sees a row's tokens in ascending order, and only a larger score replaces one, so of equal
scores the lower token stays. The reduction over lanes and threads compares tokens too. A NaN counts
as infinity, which no score exceeds. A row with either, or with nothing but minus infinity, has
NO_TOKEN instead of an argmax.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.kernel import kernel_maker
from nanovllm.model.kernels.simd.memory import load_float, load_i32
from nanovllm.model.kernels.simd.value import I32, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.step_record import NO_TOKEN, best_bytes

_INFINITY = float("inf")


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
