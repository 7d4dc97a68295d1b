"""Attention over the paged cache, whose blocks are themselves packed panels.

    keys    [layers, blocks, heads][head_dim][block_columns]     a block's keys side by side:            Q K^T is a packed product
    values  [layers, blocks, heads][block_size][head_columns]    a block's values one below the other:   and so is weights V

    block_columns, head_columns: block_size and head_dim, filled up to whole vectors

A piece of a prompt is taken head by head, QUERY_TILE queries at a time. A decoding sequence is taken block by block over a group of heads,
so that its keys and values are read in the order of memory. Either way a score is summed over head_dim in order and an output over the
tokens in order: the same operations, and so the same bits.

Slots that were never written may hold anything. Their scores are masked to weights of exactly 0, and the product with V stops at the last
token that is there, since 0 times a NaN is a NaN.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.layout import F32_BYTES
from nanovllm.model.kernels.machine import panel_vectors, panel_width
from nanovllm.model.kernels.matmul import make_tiles
from nanovllm.model.kernels.memory import load_int, make_clear, make_copy
from nanovllm.model.kernels.vector import F32, Value, Vectors, kernel

_MASKED = -1e30


def make_softmax(lanes: int) -> Any:
    """softmax(scores, visible, blocks, block_size, block_columns, scale): one row of scores to weights, in place.

    The row has `blocks` groups of `block_columns` scores, of which `block_size` count; `visible` keys in all are seen. `scale` is the
    address of a float32.
    """

    def softmax(v: Vectors, scores: Value, visible: Value, blocks: Value, block_size: Value, block_columns: Value, scale: Value) -> None:
        factor = v.splat(v.load_scalar(scale))
        masked = v.constant(_MASKED)

        def over_row(first: Value, visit: Callable[[Value, Value, Value], Value]) -> Value:
            """Carry a vector through all vectors of the row: visit(address, mask of the seen lanes, carried)."""

            def block(index: Value, carried: list[Value]) -> list[Value]:
                start = v.element(scores, v.builder.mul(index, block_columns))
                left = v.builder.sub(visible, v.builder.mul(index, block_size))
                seen = v.builder.select(v.builder.icmp_signed("<", left, block_size), left, block_size)

                def vector(i: Value, carried: list[Value]) -> list[Value]:
                    return [visit(v.element(start, i), v.first_lanes(v.builder.sub(seen, i)), carried[0])]

                return v.loop(block_columns, v.lanes, carried, vector)

            return v.loop(blocks, 1, [first], block)[0]

        def find_largest(at: Value, seen: Value, best: Value) -> Value:
            return v.maximum(v.where(seen, v.multiply(v.load(at), factor), masked), best)

        def exponentiate(at: Value, seen: Value, total: Value) -> Value:
            weight = v.where(seen, v.exp(v.subtract(v.multiply(v.load(at), factor), largest)), v.constant(0.0))
            v.store(weight, at)
            return v.add(total, weight)

        def normalise(at: Value, seen: Value, carried: Value) -> Value:
            v.store(v.multiply(v.load(at), inverse), at)
            return carried

        largest = v.splat(v.largest(over_row(masked, find_largest)))
        total = v.sum(over_row(v.constant(0.0), exponentiate))
        inverse = v.splat(v.divide(F32(1.0), total))
        over_row(masked, normalise)

    return kernel(lanes, softmax)


@cache
def make_panels(lanes: int) -> Any:
    """panels(a, a_stride, count, panel, steps, columns, out, out_stride): a product of any number of whole vectors across."""
    width = panel_width(lanes)
    four = make_tiles(lanes, panel_vectors(lanes), prefetch=False)
    two = make_tiles(lanes, 2, prefetch=False)
    one = make_tiles(lanes, 1, prefetch=False)

    @compiled
    def panels(a: int, a_stride: int, count: int, panel: int, steps: int, columns: int, out: int, out_stride: int) -> None:
        """out[count, columns] += a[count, steps] @ panel[steps, columns], for columns of any number of whole vectors."""
        stride = columns * F32_BYTES
        while columns >= width:
            four(a, a_stride, panel, stride, steps, out, out_stride, count, panel)
            panel += width * F32_BYTES
            out += width * F32_BYTES
            columns -= width
        while columns >= 2 * lanes:
            two(a, a_stride, panel, stride, steps, out, out_stride, count, panel)
            panel += 2 * lanes * F32_BYTES
            out += 2 * lanes * F32_BYTES
            columns -= 2 * lanes
        if columns > 0:
            one(a, a_stride, panel, stride, steps, out, out_stride, count, panel)

    return panels


def make_attend_prompt(lanes: int) -> Any:
    """attend_prompt(p, query, count, first, keys, values, table, scale, out, scores, mixed): one head of `count` queries.

    The first query stands at position `first`. `p` is the record of parameters.py; `keys` and `values` are the layer's, from this head on;
    `table` is where the sequence's block ids are; `scores` and `mixed` are memory of this thread.
    """
    panels, softmax, copy, clear = make_panels(lanes), make_softmax(lanes), make_copy(lanes), make_clear(lanes)

    @compiled
    def attend_prompt(
        p: Any, query: int, count: int, first: int, keys: int, values: int, table: int, scale: int, out: int, scores: int, mixed: int
    ) -> None:
        visible = first + count
        blocks = (visible + p.block_size - 1) // p.block_size
        block_bytes = p.block_columns * F32_BYTES
        stride = blocks * block_bytes
        clear(scores, count * blocks * p.block_columns)
        for block in range(blocks):
            key_panel = keys + load_int(table, block) * p.heads * p.key_bytes
            panels(query, p.qkv_stride, count, key_panel, p.head_dim, p.block_columns, scores + block * block_bytes, stride)
        for row in range(count):
            softmax(scores + row * stride, first + row + 1, blocks, p.block_size, p.block_columns, scale)
        mixed_stride = p.head_columns * F32_BYTES
        clear(mixed, count * p.head_columns)
        for block in range(blocks):
            value_panel = values + load_int(table, block) * p.heads * p.value_bytes
            steps = min(p.block_size, visible - block * p.block_size)
            panels(scores + block * block_bytes, stride, count, value_panel, steps, p.head_columns, mixed, mixed_stride)
        for row in range(count):
            copy(mixed + row * mixed_stride, out + row * p.hidden_stride, p.head_dim)

    return attend_prompt


def make_attend_token(lanes: int) -> Any:
    """attend_token(p, query, heads, position, keys, values, table, scale, out, scores, mixed): `heads` heads of one query, as attend_prompt."""
    panels, softmax, copy, clear = make_panels(lanes), make_softmax(lanes), make_copy(lanes), make_clear(lanes)

    @compiled
    def attend_token(
        p: Any, query: int, heads: int, position: int, keys: int, values: int, table: int, scale: int, out: int, scores: int, mixed: int
    ) -> None:
        visible = position + 1
        blocks = (visible + p.block_size - 1) // p.block_size
        block_bytes = p.block_columns * F32_BYTES
        stride = blocks * block_bytes
        head_bytes = p.head_dim * F32_BYTES
        mixed_stride = p.head_columns * F32_BYTES
        clear(scores, heads * blocks * p.block_columns)
        clear(mixed, heads * p.head_columns)
        for block in range(blocks):
            for head in range(heads):
                key_panel = keys + (load_int(table, block) * p.heads + head) * p.key_bytes
                at = scores + head * stride + block * block_bytes
                panels(query + head * head_bytes, 0, 1, key_panel, p.head_dim, p.block_columns, at, 0)
        for head in range(heads):
            softmax(scores + head * stride, visible, blocks, p.block_size, p.block_columns, scale)
        for block in range(blocks):
            steps = min(p.block_size, visible - block * p.block_size)
            for head in range(heads):
                value_panel = values + (load_int(table, block) * p.heads + head) * p.value_bytes
                at = scores + head * stride + block * block_bytes
                panels(at, 0, 1, value_panel, steps, p.head_columns, mixed + head * mixed_stride, 0)
        for head in range(heads):
            copy(mixed + head * mixed_stride, out + head * head_bytes, p.head_dim)

    return attend_token
