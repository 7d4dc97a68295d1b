"""The kernels that decode and prefill attention share: block matmuls, softmax and conversions."""

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.convert import make_round_row
from nanovllm.model.kernels.forward.tiles import make_batched_tiles, make_tiles
from nanovllm.model.kernels.simd.formats import Format, cache_format
from nanovllm.model.kernels.simd.kernel import kernel, kernel_maker
from nanovllm.model.kernels.simd.memory import make_copy, store_i32
from nanovllm.model.kernels.simd.rows import rows_at
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors


def make_softmax(target: KernelTarget, *, as_bfloat16: bool) -> Any:
    """Return softmax, which turns a row of scores into unnormalized weights, in place.

    scores_ptr     float32 [blocks, block_columns], of which block_size columns count
    unseen         number of keys before the first that the query sees
    visible        number of keys up to the last that it sees
    blocks         number of blocks
    block_size     tokens in a block
    block_columns  block_size in whole vectors
    scale_ptr      one float32 above 0, the factor of the scores
    inv_sum_ptr    receives 1 / sum(weights), a float32

    The largest weight is 1. Scores that are not visible get the weight 0. With `as_bfloat16` the
    weights are bfloat16 and stand at the beginning of the row, without gaps between blocks.
    """

    def softmax(
        v: Vectors, scores_ptr: Value, unseen: Value, visible: Value, blocks: Value,
        block_size: Value, block_columns: Value, scale_ptr: Value, inv_sum_ptr: Value,
    ) -> None:  # fmt: skip
        scale = v.splat(v.load_scalar(scale_ptr))

        def over_row(initial: Value, visit: Callable[[Value, Value, Value], Value]) -> Value:
            """Fold the row's vectors: visit(first column, mask of the visible lanes, carried)."""

            def block(index: Value, carried: Value) -> Value:
                first = index * block_columns
                before = index * block_size
                seen = v.minimum(visible - before, block_size)

                def vector(i: Value, carried: Value) -> Value:
                    is_seen = v.first_lanes(seen - i) & ~v.first_lanes(unseen - before - i)
                    return visit(first + i, is_seen, carried)

                return v.fold(block_columns, v.lanes, carried, vector)

            return v.fold(blocks, 1, initial, block)

        def find_largest(column: Value, is_seen: Value, largest: Value) -> Value:
            score = v.load(v.element(scores_ptr, column))
            return v.maximum(v.where(is_seen, score, float("-inf")), largest)

        def exponentiate(column: Value, is_seen: Value, total: Value) -> Value:
            score_ptr = v.element(scores_ptr, column)
            scaled = v.load(score_ptr) * scale
            weight = v.where(is_seen, v.exp(scaled - largest), 0.0)
            if as_bfloat16:  # half as long, so it never overtakes the scores still to be read
                v.store(v.round_bfloat16(weight), scores_ptr + column * 2)
            else:
                v.store(weight, score_ptr)
            return total + weight

        largest_score = v.largest(over_row(v.constant(float("-inf")), find_largest))
        largest = v.splat(largest_score) * scale
        total = v.sum(over_row(v.constant(0.0), exponentiate))
        v.store(1.0 / total, inv_sum_ptr)

    return kernel(target, softmax)


@kernel_maker()
def make_multiply_row(v: Vectors, row_ptr: Value, factor_ptr: Value, columns: Value) -> None:
    """Return multiply_row(row_ptr, factor_ptr, columns): row *= one float32, in whole vectors."""
    factor = v.splat(v.load_scalar(factor_ptr))

    with v.range(columns, v.lanes) as i:
        vector_ptr = v.element(row_ptr, i)
        v.store(v.load(vector_ptr) * factor, vector_ptr)


@kernel_maker()
def make_apply_scales(
    v: Vectors, row_ptr: Value, scales_ptr: Value, unseen: Value, seen: Value, columns: Value
) -> None:
    """Return apply_scales(row_ptr, scales_ptr, unseen, seen, columns).

    It is row[unseen:seen] *= scales[unseen:seen], in whole vectors of `columns`. Both may be below
    0. Slots that were never written have no scale.
    """
    with v.range(columns, v.lanes) as i:
        vector_ptr = v.element(row_ptr, i)
        value = v.load(vector_ptr)
        scaled = value * v.load(v.element(scales_ptr, i))
        is_seen = v.first_lanes(seen - i) & ~v.first_lanes(unseen - i)
        v.store(v.where(is_seen, scaled, value), vector_ptr)


@kernel_maker(returns=types.intp)
def make_all_finite(v: Vectors, values_ptr: Value, count: Value) -> Value:
    """Return all_finite(values_ptr, count) -> 1, or 0 where a float32 is infinite or a NaN."""

    def check(i: Value, mask: Value) -> Value:
        return mask & v.is_finite(v.load(v.element(values_ptr, i)))

    return v.every(v.fold(count, v.lanes, v.integers(-1), check))


@cache
def make_convert_query(target: KernelTarget, inputs: str) -> Any:
    """Return convert_query(source_ptr, out_ptr, count), to the type that Q K^T takes."""
    if inputs != "bfloat16":
        return make_copy(target)
    round_row = make_round_row(target)

    @compiled
    def convert_query(source_ptr: int, out_ptr: int, count: int) -> None:
        """The rest of the last word is cleared: a NaN there times a key's 0 would be NaN."""
        store_i32(out_ptr, (count - 1) // 2, 0)
        round_row(source_ptr, out_ptr, count)

    return convert_query


@cache
def make_prefetch_block(target: KernelTarget) -> Any:
    """Return prefetch_block(ptr, size_bytes): the keys or values of one head in a block.

    It does nothing where the target does not prefetch_next_block.
    """

    def prefetch(v: Vectors, ptr: Value, size_bytes: Value) -> None:
        if target.prefetch_next_block:
            with v.range(size_bytes, LINE_BYTES) as offset_bytes:
                v.prefetch(ptr + offset_bytes)

    return kernel(target, prefetch)


def _make_shared_tiles(target: KernelTarget, panel_format: Format, vectors: int) -> Any:
    """Return tiles of rows that share a panel, with the arguments of batched tiles."""
    tiles = make_tiles(target, panel_format, vectors, prefetch_lines=0)

    @compiled
    def shared_tiles(
        inputs: Any, panel: Any, step_bytes: int, steps: int, out: Any, rows: int, _offset: int
    ) -> None:
        tiles(inputs, rows_at(panel.ptr, step_bytes), steps, out, rows, panel.ptr, 0)

    return shared_tiles


@cache
def make_matmul(target: KernelTarget, cache: str, *, is_batched: bool) -> Any:
    """Return matmul: out[rows, columns] += inputs[rows, steps] @ panel[steps, columns].

    inputs                 input rows
    rows                   number of rows
    panels                 the panel of all rows, or one for each row where `is_batched`
    steps, columns         shape of a panel; columns are whole vectors
    out                    output rows
    prefetch_offset_bytes  as in tiles.py, where each row has its own panel
    """
    lanes, width = target.lanes, target.panel_width
    make_tiles_of = make_batched_tiles if is_batched else _make_shared_tiles
    panel_format = cache_format(target, cache)
    whole, two, one = (
        make_tiles_of(target, panel_format, vectors) for vectors in (target.panel_vectors, 2, 1)
    )

    @compiled
    def matmul(
        inputs: Any, rows: int, panels: Any, steps: int, columns: int, out: Any,
        prefetch_offset_bytes: int,
    ) -> None:  # fmt: skip
        step_bytes = columns * WORD_BYTES
        while columns > 0:
            if columns >= width:
                done = width
                whole(inputs, panels, step_bytes, steps, out, rows, prefetch_offset_bytes)
            elif columns >= 2 * lanes:
                done = 2 * lanes
                two(inputs, panels, step_bytes, steps, out, rows, prefetch_offset_bytes)
            else:
                done = lanes
                one(inputs, panels, step_bytes, steps, out, rows, prefetch_offset_bytes)
            panels = rows_at(panels.ptr + done * WORD_BYTES, panels.stride_bytes)
            out = rows_at(out.ptr + done * WORD_BYTES, out.stride_bytes)
            columns -= done

    return matmul
