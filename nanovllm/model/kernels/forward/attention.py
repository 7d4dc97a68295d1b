"""Attention over the paged cache, whose blocks are themselves packed panels.

    keys    [layers, blocks, heads][key_steps][block_columns]      a block's keys side by side:            Q K^T is a packed product
    values  [layers, blocks, heads][value_steps][head_columns]     a block's values one below the other:   and so is weights V

    words of 32 bits, as formats.py packs them: one float32, two bfloat16 or four int8 below each other
    key_steps, value_steps: head_dim and block_size by numbers in a word; block_columns, head_columns: filled up to whole vectors

A piece of a prompt is taken head by head, QUERY_TILE queries at a time. A decoding sequence is taken block by block over a group of heads,
so that its keys and values are read in the order of memory. Either way a score is summed over head_dim in order and an output over the
tokens in order: the same operations, and so the same bits. While a decoding sequence's block is read, the next is asked for: it may be anywhere.

Queries are first rewritten as the product wants them. Weights are e to the power of (score - largest), and what they mix is divided by their
sum in the end. A cache of bytes has a scale for each key and each value: the first multiply the scores, the second the weights.

Slots that were never written may hold anything. Their scores are masked to weights of exactly 0, and the product with V stops at the last
word that has a token, since 0 times a NaN is a NaN. The rest of that word is zeros, or bytes, which are finite whatever they are.

Among the tokens of a prompt a query's weights for the tokens after it are 0 too. Where one of those tokens has a value that is not finite,
the product of the whole tile is spoilt, which its result shows: then every query is taken again alone, with the values that it sees. What it
sees of a word that it shares with the future is copied. Bytes are finite, and their scales are applied to the tokens that a query sees.
"""

from collections.abc import Callable
from typing import Any

from numba import types

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.convert import make_round_row
from nanovllm.model.kernels.forward.tiles import make_batched_tiles, make_tiles
from nanovllm.model.kernels.simd.formats import Format, cache_format
from nanovllm.model.kernels.simd.move import load_int, make_clear, make_copy
from nanovllm.model.kernels.simd.scalar import store_i32
from nanovllm.model.kernels.simd.vector import F32, I32, Value, Vectors, kernel
from nanovllm.model.kernels.step_record import WORD_BYTES

_MASKED = float("-inf")


def make_softmax(target: KernelTarget, *, narrow: bool) -> Any:
    """softmax(scores, visible, blocks, block_size, block_columns, scale, share): one row of scores to weights, in place, and 1 / their sum.

    The row has `blocks` groups of `block_columns` scores, of which `block_size` count; `visible` keys in all are seen. `scale` is the
    address of a float32 above 0. The largest weight is 1; what is mixed by the weights is multiplied by the float32 at `share` in the end. With
    `narrow`, weights are bfloat16 and stand at the beginning of the row without gaps between groups.
    """

    def softmax(
        v: Vectors,
        scores: Value,
        visible: Value,
        blocks: Value,
        block_size: Value,
        block_columns: Value,
        scale: Value,
        share: Value,
    ) -> None:
        factor = v.splat(v.load_scalar(scale))

        def over_row(first: Value, visit: Callable[[Value, Value, Value], Value]) -> Value:
            """Carry a vector through all vectors of the row: visit(offset in numbers, mask of the seen lanes, carried)."""

            def block(index: Value, carried: list[Value]) -> list[Value]:
                start = v.builder.mul(index, block_columns)
                left = v.builder.sub(visible, v.builder.mul(index, block_size))
                seen = v.builder.select(
                    v.builder.icmp_signed("<", left, block_size), left, block_size
                )

                def vector(i: Value, carried: list[Value]) -> list[Value]:
                    return [
                        visit(
                            v.builder.add(start, i),
                            v.first_lanes(v.builder.sub(seen, i)),
                            carried[0],
                        )
                    ]

                return v.loop(block_columns, v.lanes, carried, vector)

            return v.loop(blocks, 1, [first], block)[0]

        def find_largest(place: Value, seen: Value, best: Value) -> Value:
            return v.maximum(
                v.where(seen, v.load(v.element(scores, place)), v.constant(_MASKED)), best
            )

        def exponentiate(place: Value, seen: Value, total: Value) -> Value:
            at = v.element(scores, place)
            weight = v.where(
                seen, v.exp(v.subtract(v.multiply(v.load(at), factor), largest)), v.constant(0.0)
            )
            if narrow:  # half as long, so that it never overtakes what is still to be read
                v.store(v.round_bfloat16(weight), v.address(scores, v.times(place, 2)))
            else:
                v.store(weight, at)
            return v.add(total, weight)

        largest = v.multiply(
            v.splat(v.largest(over_row(v.constant(_MASKED), find_largest))), factor
        )
        v.store(v.divide(F32(1.0), v.sum(over_row(v.constant(0.0), exponentiate))), share)

    return kernel(target, softmax)


def _make_scale_by(target: KernelTarget) -> Any:
    """scale_by(row, factor, columns): row *= the float32 at `factor`; whole vectors."""

    def scale_by(v: Vectors, row: Value, factor: Value, columns: Value) -> None:
        number = v.splat(v.load_scalar(factor))

        def vector(i: Value, _: list[Value]) -> list[Value]:
            at = v.element(row, i)
            v.store(v.multiply(v.load(at), number), at)
            return []

        v.loop(columns, v.lanes, [], vector)

    return kernel(target, scale_by)


def _make_apply_scales(target: KernelTarget) -> Any:
    """apply_scales(row, scales, seen, columns): multiply the first `seen` numbers of a row by theirs.

    Whole vectors; `seen` may be 0 or less. Slots that were never written have no scale.
    """

    def apply_scales(v: Vectors, row: Value, scales: Value, seen: Value, columns: Value) -> None:
        def vector(i: Value, _: list[Value]) -> list[Value]:
            at = v.element(row, i)
            value = v.load(at)
            scaled = v.multiply(value, v.load(v.element(scales, i)))
            v.store(v.where(v.first_lanes(v.builder.sub(seen, i)), scaled, value), at)
            return []

        v.loop(columns, v.lanes, [], vector)

    return kernel(target, apply_scales)


def _make_all_finite(target: KernelTarget) -> Any:
    """all_finite(values, count) -> 1 where none of `count` float32 is infinite or NaN, else 0; whole vectors."""

    def all_finite(v: Vectors, values: Value, count: Value) -> Value:
        def vector(i: Value, mask: list[Value]) -> list[Value]:
            return [v.builder.and_(mask[0], v.is_finite(v.load(v.element(values, i))))]

        return v.every(v.loop(count, v.lanes, [v.integers(-1)], vector)[0])

    return kernel(target, all_finite, returns=types.intp)


def _make_keep_first(target: KernelTarget, per_word: int) -> Any:
    """keep_first(words, out, places, columns): words with their first `places` numbers only, the others 0; whole vectors."""

    def keep_first(v: Vectors, words: Value, out: Value, places: Value, columns: Value) -> None:
        bits = v.builder.trunc(v.times(places, 32 // per_word), I32)
        mask = v.splat(v.builder.sub(v.builder.shl(I32(1), bits), I32(1)))

        def vector(i: Value, _: list[Value]) -> list[Value]:
            v.store(v.builder.and_(v.load_words(v.element(words, i)), mask), v.element(out, i))
            return []

        v.loop(columns, v.lanes, [], vector)

    return kernel(target, keep_first)


def _make_panels(target: KernelTarget, make: Callable[[int], Any]) -> Any:
    """panels(a, a_stride, count, panel, row_stride, steps, columns, out, out_stride, ahead): a product of any number of whole vectors across.

    `make(vectors)` gives the tiles of so many vectors; `row_stride` is how far apart the rows' own panels are, where each has one.
    """
    lanes, width = target.lanes, target.panel_width
    whole, two, one = (make(vectors) for vectors in (target.panel_vectors, 2, 1))

    @compiled
    def panels(
        a: int,
        a_stride: int,
        count: int,
        panel: int,
        row_stride: int,
        steps: int,
        columns: int,
        out: int,
        out_stride: int,
        ahead: int,
    ) -> None:
        """out[row, columns] += a[row, steps] @ panel[steps, columns]."""
        stride = columns * WORD_BYTES
        while columns >= width:
            whole(a, a_stride, panel, row_stride, stride, steps, out, out_stride, count, ahead)
            panel += width * WORD_BYTES
            out += width * WORD_BYTES
            columns -= width
        while columns >= 2 * lanes:
            two(a, a_stride, panel, row_stride, stride, steps, out, out_stride, count, ahead)
            panel += 2 * lanes * WORD_BYTES
            out += 2 * lanes * WORD_BYTES
            columns -= 2 * lanes
        if columns > 0:
            one(a, a_stride, panel, row_stride, stride, steps, out, out_stride, count, ahead)

    return panels


def _make_shared_tiles(target: KernelTarget, numbers: Format, vectors: int) -> Any:
    """Tiles of rows that share their panel, called as batched ones are."""
    tiles = make_tiles(target, numbers, vectors, ahead_lines=0)

    @compiled
    def shared_tiles(
        a: int,
        a_stride: int,
        panel: int,
        row_stride: int,
        panel_stride: int,
        steps: int,
        out: int,
        out_stride: int,
        count: int,
        ahead: int,
    ) -> None:
        tiles(a, a_stride, panel, panel_stride, steps, out, out_stride, count, panel)

    return shared_tiles


class AttentionParts:
    """What both kinds of attention are made of.

    panels, batched_panels: _make_panels of rows that share a panel, and of rows that have their own.
    softmax: make_softmax. apply_scales: _make_apply_scales. scale_by: _make_scale_by.
    encode_query(source, out, count): a query as the product with K takes it.
    mix_alone: _make_mix_alone.
    store(source, out, count): an output of attention as the next product takes it: bfloat16 where weights are.
    """

    def __init__(self, target: KernelTarget, weights: str, cache: str) -> None:
        """For one type of weights and one of the cache."""
        copy, round_row = make_copy(target), make_round_row(target)
        self.numbers = cache_format(target, cache)
        self.panels = _make_panels(
            target, lambda vectors: _make_shared_tiles(target, self.numbers, vectors)
        )
        self.batched_panels = _make_panels(
            target, lambda vectors: make_batched_tiles(target, self.numbers, vectors)
        )
        self.softmax = make_softmax(target, narrow=cache == "bfloat16")
        self.apply_scales = _make_apply_scales(target)
        self.scale_by = _make_scale_by(target)
        self.clear = make_clear(target)
        self.all_finite = _make_all_finite(target)
        self.encode_query = _make_encode_query(cache, round_row, copy)
        self.store = round_row if weights == "bfloat16" else copy
        self.has_scales = cache == "int8"
        self.weight_bytes = 2 if cache == "bfloat16" else WORD_BYTES
        self.stored_bytes = 2 if weights == "bfloat16" else WORD_BYTES
        self.mix_alone = _make_mix_alone(target, self)


@compiled
def place_of(p: Any, layer: int, table: int, block: int) -> int:
    """Where the first head of a sequence's block number `block` is, counted in heads of blocks of all layers."""
    return (layer * p.blocks + load_int(table, block)) * p.heads


def _make_encode_query(cache: str, round_row: Any, copy: Any) -> Any:
    """encode_query(source, out, count): see AttentionParts."""
    if cache != "bfloat16":
        return copy

    @compiled
    def encode_query(source: int, out: int, count: int) -> None:
        """The rest of the last word is 0: there may be anything, and times a key's 0 it must give 0."""
        store_i32(out, (count - 1) // 2, 0)
        round_row(source, out, count)

    return encode_query


def _make_mix_alone(target: KernelTarget, parts: AttentionParts) -> Any:
    """mix_alone(p, layer, head, table, weights, stride, count, first, mixed): each query's weights times the values that it sees.

    One query after the other, the first at position `first`; `stride` bytes lie between their
    weights. The sums are in `mixed`, behind which there is room for one more row.
    """
    panels, clear, weight_bytes = parts.panels, parts.clear, parts.weight_bytes
    per_word, step_bytes = parts.numbers.per_word, parts.numbers.input_bytes
    keep_first = _make_keep_first(target, per_word)

    @compiled
    def mix_alone(
        p: Any,
        layer: int,
        head: int,
        table: int,
        weights: int,
        stride: int,
        count: int,
        first: int,
        mixed: int,
    ) -> None:
        columns, row_bytes = p.head_columns, p.head_columns * WORD_BYTES
        clear(mixed, count * columns)
        for row in range(count):
            seen, out, spare = first + row + 1, mixed + row * row_bytes, mixed + count * row_bytes
            for block in range((seen + p.block_size - 1) // p.block_size):
                at = weights + row * stride + block * p.block_columns * weight_bytes
                values = p.values + (place_of(p, layer, table, block) + head) * p.value_bytes
                tokens = min(p.block_size, seen - block * p.block_size)
                words, rest = tokens // per_word, tokens % per_word
                panels(at, 0, 1, values, 0, words, columns, out, 0, 0)
                if rest > 0:
                    keep_first(values + words * row_bytes, spare, rest, columns)
                    panels(at + words * step_bytes, 0, 1, spare, 0, 1, columns, out, 0, 0)

    return mix_alone


def make_attend_prompt(target: KernelTarget, parts: AttentionParts) -> Any:
    """attend_prompt(p, thread, layer, head, table, query, count, first, out): one head of `count` queries, the first at position `first`.

    `p` is the record of step_record.py, `table` is where the sequence's block ids are, `query` and `out` are the first query's rows.
    """
    panels, softmax, apply_scales, scale_by, clear, encode_query, store = (
        parts.panels, parts.softmax, parts.apply_scales, parts.scale_by, parts.clear, parts.encode_query, parts.store,
    )  # fmt: skip
    has_scales, per_word, weight_bytes, stored_bytes = (
        parts.has_scales,
        parts.numbers.per_word,
        parts.weight_bytes,
        parts.stored_bytes,
    )

    all_finite, mix_alone = parts.all_finite, parts.mix_alone

    @compiled
    def attend_prompt(
        p: Any,
        thread: int,
        layer: int,
        head: int,
        table: int,
        query: int,
        count: int,
        first: int,
        out: int,
    ) -> None:
        visible = first + count
        blocks = (visible + p.block_size - 1) // p.block_size
        columns, head_columns = p.block_columns, p.head_columns
        stride = blocks * columns * WORD_BYTES
        scores, mixed, queries = (
            p.scores + thread * p.scores_bytes,
            p.scratch + thread * p.scratch_bytes,
            p.queries + thread * p.queries_bytes,
        )
        for row in range(count):
            encode_query(
                query + row * p.qkv_stride + head * p.head_dim * WORD_BYTES,
                queries + row * p.query_stride,
                p.head_dim,
            )
        clear(scores, count * blocks * columns)
        for block in range(blocks):
            place = place_of(p, layer, table, block) + head
            at = scores + block * columns * WORD_BYTES
            panels(
                queries,
                p.query_stride,
                count,
                p.keys + place * p.key_bytes,
                0,
                p.key_steps,
                columns,
                at,
                stride,
                0,
            )
            if has_scales:
                seen = min(p.block_size, visible - block * p.block_size)
                for row in range(count):
                    apply_scales(
                        at + row * stride,
                        p.key_scales + place * columns * WORD_BYTES,
                        seen,
                        columns,
                    )
        scale, shares = (
            p.scales + layer * WORD_BYTES,
            queries,
        )  # a query has done its part: in its place stands its weights' share
        for row in range(count):
            softmax(
                scores + row * stride,
                first + row + 1,
                blocks,
                p.block_size,
                columns,
                scale,
                shares + row * p.query_stride,
            )
        mixed_stride = head_columns * WORD_BYTES
        clear(mixed, count * head_columns)
        for block in range(blocks):
            place = place_of(p, layer, table, block) + head
            at = scores + block * columns * weight_bytes
            if has_scales:
                for row in range(count):
                    apply_scales(
                        at + row * stride,
                        p.value_scales + place * columns * WORD_BYTES,
                        min(p.block_size, first + row + 1 - block * p.block_size),
                        columns,
                    )
            steps = (min(p.block_size, visible - block * p.block_size) + per_word - 1) // per_word
            panels(
                at,
                stride,
                count,
                p.values + place * p.value_bytes,
                0,
                steps,
                head_columns,
                mixed,
                mixed_stride,
                0,
            )
        if not has_scales and not all_finite(mixed, count * head_columns):
            mix_alone(p, layer, head, table, scores, stride, count, first, mixed)
        for row in range(count):
            scale_by(mixed + row * mixed_stride, shares + row * p.query_stride, head_columns)
            store(
                mixed + row * mixed_stride,
                out + row * p.hidden_stride + head * p.head_dim * stored_bytes,
                p.head_dim,
            )

    return attend_prompt


def make_attend_token(target: KernelTarget, parts: AttentionParts) -> Any:
    """attend_token(p, thread, layer, first_head, heads, table, query, position, out): some heads of one query; see attend_prompt."""
    panels, softmax, apply_scales, scale_by, clear, encode_query, store = (
        parts.batched_panels, parts.softmax, parts.apply_scales, parts.scale_by, parts.clear, parts.encode_query, parts.store,
    )  # fmt: skip
    has_scales, per_word, weight_bytes, stored_bytes = (
        parts.has_scales,
        parts.numbers.per_word,
        parts.weight_bytes,
        parts.stored_bytes,
    )

    @compiled
    def attend_token(
        p: Any,
        thread: int,
        layer: int,
        first_head: int,
        heads: int,
        table: int,
        query: int,
        position: int,
        out: int,
    ) -> None:
        visible = position + 1
        blocks = (visible + p.block_size - 1) // p.block_size
        columns, head_columns = p.block_columns, p.head_columns
        stride, mixed_stride = blocks * columns * WORD_BYTES, head_columns * WORD_BYTES
        scores, mixed, queries = (
            p.scores + thread * p.scores_bytes,
            p.scratch + thread * p.scratch_bytes,
            p.queries + thread * p.queries_bytes,
        )
        for head in range(heads):
            encode_query(
                query + (first_head + head) * p.head_dim * WORD_BYTES,
                queries + head * p.query_stride,
                p.head_dim,
            )
        clear(scores, heads * blocks * columns)
        clear(mixed, heads * head_columns)
        for block in range(blocks):
            place = place_of(p, layer, table, block) + first_head
            at, here = scores + block * columns * WORD_BYTES, p.keys + place * p.key_bytes
            following = p.values + (place_of(p, layer, table, 0) + first_head) * p.value_bytes
            if block + 1 < blocks:
                following = (
                    p.keys + (place_of(p, layer, table, block + 1) + first_head) * p.key_bytes
                )
            panels(
                queries,
                p.query_stride,
                heads,
                here,
                p.key_bytes,
                p.key_steps,
                columns,
                at,
                stride,
                following - here,
            )
            if has_scales:
                seen = min(p.block_size, visible - block * p.block_size)
                for head in range(heads):
                    apply_scales(
                        at + head * stride,
                        p.key_scales + (place + head) * columns * WORD_BYTES,
                        seen,
                        columns,
                    )
        scale, shares = p.scales + layer * WORD_BYTES, queries  # as in attend_prompt
        for head in range(heads):
            softmax(
                scores + head * stride,
                visible,
                blocks,
                p.block_size,
                columns,
                scale,
                shares + head * p.query_stride,
            )
        for block in range(blocks):
            place = place_of(p, layer, table, block) + first_head
            seen = min(p.block_size, visible - block * p.block_size)
            steps = (seen + per_word - 1) // per_word
            at = scores + block * columns * weight_bytes
            if has_scales:
                for head in range(heads):
                    apply_scales(
                        at + head * stride,
                        p.value_scales + (place + head) * columns * WORD_BYTES,
                        seen,
                        columns,
                    )
            here = p.values + place * p.value_bytes
            following = (
                p.values
                + (place_of(p, layer, table, min(block + 1, blocks - 1)) + first_head)
                * p.value_bytes
            )
            panels(
                at,
                stride,
                heads,
                here,
                p.value_bytes,
                steps,
                head_columns,
                mixed,
                mixed_stride,
                following - here,
            )
        for head in range(heads):
            scale_by(mixed + head * mixed_stride, shares + head * p.query_stride, head_columns)
            store(
                mixed + head * mixed_stride,
                out + (first_head + head) * p.head_dim * stored_bytes,
                p.head_dim,
            )

    return attend_token
