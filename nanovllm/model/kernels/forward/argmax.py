"""The most likely word of each row while the head's product goes on: no row of logits is ever written, none is read again.

Every thread keeps, for each row, the best score so far in each lane and the word that had it:

    best   [threads][rows] | value x lanes | word x lanes |

A panel's words come in ascending order and only a larger score takes a lane over, so of equals the lower word stays; the reduction over
lanes and threads compares words too. NaN counts as infinity, which nothing exceeds: a row that has either ends without a word, as does a
row in which everything is minus infinity. So it is argmax where the row is sound, and nothing where it is not.
"""

from typing import Any

from llvmlite import ir

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import F32_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.scalar import load_float, load_i32
from nanovllm.model.kernels.simd.vector import I32, Value, Vectors, kernel
from nanovllm.model.kernels.step_record import NO_WORD, best_bytes

_INFINITY = float("inf")


def make_clear_best(target: KernelTarget) -> Any:
    """clear_best(best, rows): no word has been seen yet."""
    lanes = target.lanes
    row_bytes = best_bytes(lanes)

    def clear_best(v: Vectors, best: Value, rows: Value) -> None:
        def row(i: Value, _: list[Value]) -> list[Value]:
            at = v.address(best, v.times(i, row_bytes))
            v.store(v.constant(-_INFINITY), at)
            v.store(v.integers(0), at, lanes * F32_BYTES)
            return []

        v.loop(rows, 1, [], row)

    return kernel(target, clear_best)


def make_update_best(target: KernelTarget) -> Any:
    """update_best(scores, columns, first_word, vocab, best): a finished row of a panel, whose first column is `first_word`.

    `columns` scores are whole vectors; those from `vocab` on only fill the panel up and are no words.
    """
    lanes = target.lanes

    def update_best(
        v: Vectors, scores: Value, columns: Value, first_word: Value, vocab: Value, best: Value
    ) -> None:
        left = v.builder.sub(vocab, first_word)
        numbers = ir.Constant(v.i32s, [I32(lane) for lane in range(lanes)])
        value = v.load(best)
        word = v.builder.bitcast(v.load(best, lanes * F32_BYTES), v.i32s)

        def vector(i: Value, carried: list[Value]) -> list[Value]:
            value, word = carried
            score = v.load(v.element(scores, i))
            score = v.where(
                v.builder.fcmp_ordered("<", score, v.constant(_INFINITY)),
                score,
                v.constant(_INFINITY),
            )
            score = v.where(v.first_lanes(v.builder.sub(left, i)), score, v.constant(-_INFINITY))
            is_better = v.builder.fcmp_ordered(">", score, value)
            here = v.builder.add(
                v.splat(v.builder.trunc(v.builder.add(first_word, i), I32)), numbers
            )
            return [v.where(is_better, score, value), v.where(is_better, here, word)]

        value, word = v.loop(columns, lanes, [value, word], vector)
        v.store(value, best)
        v.store(word, best, lanes * F32_BYTES)

    return kernel(target, update_best)


def make_choose_best(target: KernelTarget) -> Any:
    """choose_best(best, threads, thread_bytes) -> the word of one row, or NO_WORD; `best` is that row in the first thread's memory."""
    lanes = target.lanes

    @compiled
    def choose_best(best: int, threads: int, thread_bytes: int) -> int:
        chosen = NO_WORD
        largest = load_float(best, 0)
        for thread in range(threads):
            at = best + thread * thread_bytes
            for lane in range(lanes):
                value = load_float(at, lane)
                word = load_i32(at, lanes + lane)
                if chosen == NO_WORD or value > largest or (value == largest and word < chosen):
                    largest, chosen = value, word
        return chosen if abs(largest) < _INFINITY else NO_WORD

    return choose_best
