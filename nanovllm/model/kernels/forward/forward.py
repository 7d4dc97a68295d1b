"""The compiled forward pass: the operations of nanovllm/model/gpt2.py under the same names in the same order.

Several threads enter it at once, each with its number. An operation is a phase (barrier.py): the
threads take its items, and the barrier at its end opens when all are computed, since the next operation
reads what this one wrote. Which thread computes a row, a panel or a head changes nothing about how it
is computed.

What a product takes its rows in is the type of the weights: float32 as it is, bfloat16 by whoever makes the row, and int8 by an operation
of its own where a row is made by several threads, because a row's scale needs the whole row.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import PHASE_BYTES
from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.forward.attention import (
    AttentionParts,
    make_attend_prompt,
    make_attend_token,
)
from nanovllm.model.kernels.forward.convert import (
    make_encode_input,
    make_encode_token,
    make_insert,
    make_widen_row,
)
from nanovllm.model.kernels.forward.layernorm import make_layer_norm
from nanovllm.model.kernels.forward.matmul import make_product
from nanovllm.model.kernels.simd.formats import cache_format
from nanovllm.model.kernels.simd.move import (
    INT_BYTES,
    linear_at,
    load_int,
    make_add,
    make_clear,
    make_copy,
    make_scatter,
    step_record_at,
)
from nanovllm.model.kernels.step_record import (
    ATTENTION_OUT,
    ATTENTION_PHASES,
    DOWN,
    FEED_FORWARD_PHASES,
    ITEM_FIELDS,
    LINEAR,
    LINEARS_PER_LAYER,
    NOTES_BYTES,
    QKV,
    UP,
    WORD_BYTES,
)  # fmt: skip
from nanovllm.model.kernels.threads.barrier import barrier, take_item

LINEAR_BYTES = LINEAR.itemsize
_ITEMS_PER_THREAD = 4  # of a phase over rows: few enough to cost little, enough for one that is late to matter little


@compiled
def rows_per_item(rows: int, threads: int) -> int:
    """Rows that a thread takes at once in a phase over rows."""
    return max(1, rows // (_ITEMS_PER_THREAD * threads))


@cache
def make_forward(spec: Spec) -> Any:
    """forward(address, thread): a whole step, from token ids to the normalised hidden state of the wanted rows, in `final`.

    `address` is where the record of step_record.py is.
    """
    embed, final_norm = _make_embed(spec), _make_final_norm(spec)
    self_attention, feed_forward = _make_self_attention(spec), _make_feed_forward(spec)

    @compiled
    def forward(address: int, thread: int) -> None:
        p = step_record_at(address)
        phase = p.phases
        if not embed(p, thread, phase):
            return
        phase += PHASE_BYTES
        for layer in range(p.layers):
            if not self_attention(p, thread, phase, layer):
                return
            phase += ATTENTION_PHASES * PHASE_BYTES
            if not feed_forward(p, thread, phase, layer):
                return
            phase += FEED_FORWARD_PHASES * PHASE_BYTES
        final_norm(p, thread, phase)

    return forward


def _make_self_attention(spec: Spec) -> Any:
    normalise, multiply, encode_rows = (
        _make_normalise(spec),
        _make_multiply(spec),
        make_encode_rows(spec),
    )
    store_keys_and_values, paged_attention = _make_store(spec), _make_paged_attention(spec)
    is_int8 = spec.weights == "int8"

    @compiled
    def self_attention(p: Any, thread: int, phase: int, layer: int) -> bool:
        """hidden += attention(layer_norm(hidden)), in phases from `phase` on; returns whether to go on."""
        row, number = layer * p.hidden_stride, layer * LINEARS_PER_LAYER
        gain, bias = p.attention_gain + row, p.attention_bias + row
        mixed, mixed_stride = p.mixed, p.hidden_stride
        if is_int8:
            mixed, mixed_stride = p.inputs, p.input_stride
        out = number + ATTENTION_OUT
        return (
            normalise(p, thread, phase, gain, bias, number + QKV)
            and multiply(
                p, thread, phase + PHASE_BYTES, number + QKV, p.inputs, p.input_stride, p.qkv,
                p.qkv_stride,
            )
            and store_keys_and_values(p, thread, phase + 2 * PHASE_BYTES, layer)
            and paged_attention(p, thread, phase + 3 * PHASE_BYTES, layer)
            and (
                not is_int8
                or encode_rows(
                    p, thread, phase + 4 * PHASE_BYTES, p.tokens, p.mixed, p.hidden_stride,
                    p.d_model, out,
                )
            )
            and multiply(
                p, thread, phase + 5 * PHASE_BYTES, out, mixed, mixed_stride, p.hidden,
                p.hidden_stride,
            )
        )  # fmt: skip

    return self_attention


def _make_feed_forward(spec: Spec) -> Any:
    normalise, multiply, encode_rows = (
        _make_normalise(spec),
        _make_multiply(spec),
        make_encode_rows(spec),
    )
    is_int8 = spec.weights == "int8"

    @compiled
    def feed_forward(p: Any, thread: int, phase: int, layer: int) -> bool:
        """hidden += down(activation(up(layer_norm(hidden)))), in phases from `phase` on; returns whether to go on."""
        row, number = layer * p.hidden_stride, layer * LINEARS_PER_LAYER
        middle, middle_stride = p.middle, p.middle_stride
        if is_int8:
            middle, middle_stride = p.inputs, p.input_stride
        return (
            normalise(p, thread, phase, p.ffn_gain + row, p.ffn_bias + row, number + UP)
            and multiply(
                p, thread, phase + PHASE_BYTES, number + UP, p.inputs, p.input_stride, p.middle,
                p.middle_stride,
            )
            and (
                not is_int8
                or encode_rows(
                    p, thread, phase + 2 * PHASE_BYTES, p.tokens, p.middle, p.middle_stride,
                    p.d_ff, number + DOWN,
                )
            )
            and multiply(
                p, thread, phase + 3 * PHASE_BYTES, number + DOWN, middle, middle_stride,
                p.hidden, p.hidden_stride,
            )
        )  # fmt: skip

    return feed_forward


def _make_embed(spec: Spec) -> Any:
    target = spec.target
    clear, copy, add, widen_row = (
        make_clear(target),
        make_copy(target),
        make_add(target),
        make_widen_row(target),
    )

    @compiled
    def embed(p: Any, thread: int, phase: int) -> bool:
        """hidden = token embedding + position embedding; what fills a row up is zero and stays so."""
        size = rows_per_item(p.tokens, p.threads)
        items = (p.tokens + size - 1) // size
        done = 0
        item = take_item(phase)
        while item < items:
            for token in range(item * size, min(p.tokens, (item + 1) * size)):
                hidden = p.hidden + token * p.hidden_stride
                clear(hidden, p.d_model)
                row = p.token_embedding + load_int(p.token_ids, token) * p.embedding_bytes
                if p.embedding_is_narrow:
                    widen_row(row, hidden, p.d_model)
                else:
                    copy(row, hidden, p.d_model)
                position = load_int(p.positions, token)
                add(p.position_embedding + position * p.hidden_stride, hidden, p.d_model)
            done += 1
            item = take_item(phase)
        return barrier(p.job, phase, thread, done, items)

    return embed


@cache
def make_encode_rows(spec: Spec) -> Any:
    """encode_rows(p, thread, phase, rows, source, stride, count, number) -> whether to go on.

    A phase: `rows` rows of `source` into `inputs`, as product number `number` takes them.
    """
    encode_input = make_encode_input(spec.target, spec.weights)

    @compiled
    def encode_rows(
        p: Any,
        thread: int,
        phase: int,
        rows: int,
        source: int,
        stride: int,
        count: int,
        number: int,
    ) -> bool:
        linear = linear_at(p.linears + number * LINEAR_BYTES)
        size = rows_per_item(rows, p.threads)
        items = (rows + size - 1) // size
        done = 0
        item = take_item(phase)
        while item < items:
            for row in range(item * size, min(rows, (item + 1) * size)):
                encode_input(
                    source + row * stride, count, linear, p.inputs + row * p.input_stride,
                    p.input_notes + row * NOTES_BYTES,
                )  # fmt: skip
            done += 1
            item = take_item(phase)
        return barrier(p.job, phase, thread, done, items)

    return encode_rows


@cache
def _make_normalise(spec: Spec) -> Any:
    layer_norm, encode_input = (
        make_layer_norm(spec.target),
        make_encode_input(spec.target, spec.weights),
    )
    is_float32 = spec.weights == "float32"

    @compiled
    def normalise(p: Any, thread: int, phase: int, gain: int, bias: int, number: int) -> bool:
        """inputs = layer_norm(hidden), as product number `number` takes them."""
        linear = linear_at(p.linears + number * LINEAR_BYTES)
        size = rows_per_item(p.tokens, p.threads)
        items = (p.tokens + size - 1) // size
        done = 0
        item = take_item(phase)
        while item < items:
            for token in range(item * size, min(p.tokens, (item + 1) * size)):
                out = p.inputs + token * p.input_stride
                row = out if is_float32 else p.row + thread * p.row_bytes
                hidden = p.hidden + token * p.hidden_stride
                layer_norm(hidden, gain, bias, row, p.d_model, p.epsilon)
                if not is_float32:
                    notes = p.input_notes + token * NOTES_BYTES
                    encode_input(row, p.d_model, linear, out, notes)
            done += 1
            item = take_item(phase)
        return barrier(p.job, phase, thread, done, items)

    return normalise


def _make_final_norm(spec: Spec) -> Any:
    layer_norm = make_layer_norm(spec.target)

    @compiled
    def final_norm(p: Any, thread: int, phase: int) -> None:
        """final = layer_norm(hidden) of the rows that are wanted; the last phase of a run needs no barrier."""
        row = take_item(phase)
        while row < p.rows:
            hidden = p.hidden + load_int(p.logit_rows, row) * p.hidden_stride
            out = p.final + row * p.hidden_stride
            layer_norm(hidden, p.final_gain, p.final_bias, out, p.d_model, p.epsilon)
            row = take_item(phase)

    return final_norm


@cache
def _make_multiply(spec: Spec) -> Any:
    product = make_product(spec.target, spec.weights)

    @compiled
    def multiply(
        p: Any,
        thread: int,
        phase: int,
        number: int,
        rows: int,
        stride: int,
        out: int,
        out_stride: int,
    ) -> bool:
        """Product number `number` of the network, counted through all layers, for all tokens."""
        at = p.linears + number * LINEAR_BYTES
        return product(
            p, linear_at(at), linear_at(at + LINEAR_BYTES), thread, phase, rows, stride, p.tokens,
            p.input_notes, out, out_stride,
        )  # fmt: skip

    return multiply


def _make_store(spec: Spec) -> Any:
    encode_token, scatter = make_encode_token(spec.target, spec.cache), make_scatter(spec.target)
    per_word = cache_format(spec.target, spec.cache).per_word
    insert = make_insert(spec.target, per_word)

    @compiled
    def store_keys_and_values(p: Any, thread: int, phase: int, layer: int) -> bool:
        """Every token's key into a column, its value into a row of its block.

        An item is a group of heads: tokens that share words of the values are stored by one thread,
        in their order.
        """
        codes = p.row + thread * p.row_bytes
        items = min(p.heads, 2 * p.threads)
        done = 0
        item = take_item(phase)
        while item < items:
            first_head, end_head = p.heads * item // items, p.heads * (item + 1) // items
            for token in range(p.tokens):
                slot = load_int(p.slots, token)
                offset = slot % p.block_size
                blocks = (layer * p.blocks + slot // p.block_size) * p.heads
                row = p.qkv + token * p.qkv_stride + p.d_model * WORD_BYTES
                for head in range(first_head, end_head):
                    key = row + head * p.head_dim * WORD_BYTES
                    store_head(p, codes, key, blocks + head, offset)
            done += 1
            item = take_item(phase)
        return barrier(p.job, phase, thread, done, items)

    @compiled
    def store_head(p: Any, codes: int, key: int, place: int, offset: int) -> None:
        """The key at address `key` and its value, at an offset in one head's part of a block."""
        scale = (place * p.block_columns + offset) * WORD_BYTES
        encode_token(key, p.head_dim, codes, p.key_scales + scale)
        keys = p.keys + place * p.key_bytes + offset * WORD_BYTES
        scatter(codes, keys, p.block_columns * WORD_BYTES, p.key_steps)
        encode_token(key + p.d_model * WORD_BYTES, p.head_dim, codes, p.value_scales + scale)
        row_bytes = p.head_columns * WORD_BYTES
        values = p.values + place * p.value_bytes + offset // per_word * row_bytes
        insert(codes, values, offset % per_word, p.head_columns)

    return store_keys_and_values


def _make_paged_attention(spec: Spec) -> Any:
    parts = AttentionParts(spec.target, spec.weights, spec.cache)
    attend_prompt, attend_token = (
        make_attend_prompt(spec.target, parts),
        make_attend_token(spec.target, parts),
    )

    @compiled
    def paged_attention(p: Any, thread: int, phase: int, layer: int) -> bool:
        """Every token's attention to its own sequence.

        The items are decoding sequences whole, the last of them by groups of heads, then prompts by
        chunk and head. A whole sequence is read in the order of memory; groups let no thread wait
        long for another at the end.
        """
        groups = min(p.threads, p.heads)
        whole = max(0, p.decodes - 2 * p.threads)
        decode_items = whole + (p.decodes - whole) * groups
        items = decode_items + p.chunks * p.heads
        done = 0
        item = take_item(phase)
        while item < items:
            if item < whole:
                decode(p, thread, layer, item, 0, p.heads)
            elif item < decode_items:
                group = (item - whole) % groups
                first_head = p.heads * group // groups
                heads = p.heads * (group + 1) // groups - first_head
                decode(p, thread, layer, whole + (item - whole) // groups, first_head, heads)
            else:
                item -= decode_items
                prefill(p, thread, layer, item // p.heads, item % p.heads)
            done += 1
            item = take_item(phase)
        return barrier(p.job, phase, thread, done, items)

    @compiled
    def decode(p: Any, thread: int, layer: int, number: int, first_head: int, heads: int) -> None:
        """Some heads' attention of decoding sequence `number`."""
        at = number * ITEM_FIELDS
        table = p.block_tables + load_int(p.decode_items, at) * p.max_blocks * INT_BYTES
        token = load_int(p.decode_items, at + 1)
        attend_token(
            p, thread, layer, first_head, heads, table, p.qkv + token * p.qkv_stride,
            load_int(p.decode_items, at + 3), p.mixed + token * p.hidden_stride,
        )  # fmt: skip

    @compiled
    def prefill(p: Any, thread: int, layer: int, number: int, head: int) -> None:
        """One head's attention of chunk `number`."""
        at = number * ITEM_FIELDS
        table = p.block_tables + load_int(p.chunk_items, at) * p.max_blocks * INT_BYTES
        token = load_int(p.chunk_items, at + 1)
        attend_prompt(
            p, thread, layer, head, table, p.qkv + token * p.qkv_stride,
            load_int(p.chunk_items, at + 2), load_int(p.chunk_items, at + 3),
            p.mixed + token * p.hidden_stride,
        )  # fmt: skip

    return paged_attention
