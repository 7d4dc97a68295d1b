"""The compiled forward pass: the operations of nanovllm/model/gpt2.py under the same names in the same order.

Several threads enter it at once, each with its number. An operation is divided among them, and between two operations they wait for
each other, since the second reads what the first wrote. Which thread computes a row, a panel or a head changes nothing about how it is
computed.

What a product takes its rows in is the type of the weights: float32 as it is, bfloat16 by whoever makes the row, and int8 by an operation
of its own where a row is made by several threads, because a row's scale needs the whole row.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.attention import AttentionParts, make_attend_prompt, make_attend_token
from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.epilogue import make_epilogue
from nanovllm.model.kernels.formats import cache_format
from nanovllm.model.kernels.greedy import make_choose_best, make_clear_best, make_update_best
from nanovllm.model.kernels.layernorm import make_layer_norm
from nanovllm.model.kernels.layout import LINE_BYTES
from nanovllm.model.kernels.matmul import group_rows, make_panel_sums, make_product
from nanovllm.model.kernels.memory import (
    INT_BYTES,
    linear_at,
    load_int,
    make_add,
    make_clear,
    make_copy,
    make_scatter,
    parameters_at,
)
from nanovllm.model.kernels.parameters import (
    ATTENTION_COUNTERS,
    ATTENTION_OUT,
    DOWN,
    ITEM_FIELDS,
    LINEAR,
    LINEARS_PER_LAYER,
    NOTES_BYTES,
    QKV,
    STORE,
    UP,
    WORD_BYTES,
    best_bytes,
)  # fmt: skip
from nanovllm.model.kernels.quantise import (
    make_encode_input,
    make_encode_token,
    make_insert,
    make_widen_row,
)
from nanovllm.model.kernels.scalars import store_int
from nanovllm.model.kernels.target import Spec
from nanovllm.model.kernels.threads import atomic_add, barrier, has_failed

_LINEAR_BYTES = LINEAR.itemsize


@cache
def make_forward(spec: Spec) -> Any:
    """forward(address, thread): a whole step, from token ids to the normalised hidden state of the wanted rows, in `final`.

    `address` is where the record of parameters.py is.
    """
    layer_norm = make_layer_norm(spec.target)
    embed = _make_embed(spec)
    normalise = _make_normalise(spec)
    multiply = _make_multiply(spec)
    encode_rows = _make_encode_rows(spec)
    store_keys_and_values = _make_store(spec)
    paged_attention = _make_paged_attention(spec)
    is_int8 = spec.weights == "int8"

    @compiled
    def forward(address: int, thread: int) -> None:
        p = parameters_at(address)
        begin, end = p.tokens * thread // p.threads, p.tokens * (thread + 1) // p.threads
        attended, activated = (p.inputs, p.inputs) if is_int8 else (p.mixed, p.middle)
        attended_stride, activated_stride = (
            (p.input_stride, p.input_stride) if is_int8 else (p.hidden_stride, p.middle_stride)
        )
        reached = 0
        embed(p, begin, end)
        for layer in range(p.layers):
            if has_failed(p.arrived):
                return
            row, number = layer * p.hidden_stride, layer * LINEARS_PER_LAYER
            normalise(
                p, thread, begin, end, p.attention_gain + row, p.attention_bias + row, number + QKV
            )
            reached = meet(p, reached)
            multiply(p, thread, number + QKV, p.inputs, p.input_stride, p.qkv, p.qkv_stride)
            reached = meet(p, reached)
            store_keys_and_values(p, thread, layer)
            reached = meet(p, reached)
            paged_attention(p, thread, layer)
            reached = meet(p, reached)
            if is_int8:
                encode_rows(
                    p, begin, end, p.mixed, p.hidden_stride, p.d_model, number + ATTENTION_OUT
                )
                reached = meet(p, reached)
            multiply(
                p,
                thread,
                number + ATTENTION_OUT,
                attended,
                attended_stride,
                p.hidden,
                p.hidden_stride,
            )
            reached = meet(p, reached)

            normalise(p, thread, begin, end, p.ffn_gain + row, p.ffn_bias + row, number + UP)
            reached = meet(p, reached)
            multiply(p, thread, number + UP, p.inputs, p.input_stride, p.middle, p.middle_stride)
            reached = meet(p, reached)
            if is_int8:
                encode_rows(p, begin, end, p.middle, p.middle_stride, p.d_ff, number + DOWN)
                reached = meet(p, reached)
            multiply(
                p, thread, number + DOWN, activated, activated_stride, p.hidden, p.hidden_stride
            )
            reached = meet(p, reached)
        for wanted in range(p.rows * thread // p.threads, p.rows * (thread + 1) // p.threads):
            source = p.hidden + load_int(p.logit_rows, wanted) * p.hidden_stride
            layer_norm(
                source,
                p.final_gain,
                p.final_bias,
                p.final + wanted * p.hidden_stride,
                p.d_model,
                p.epsilon,
            )

    return forward


@cache
def make_logits(spec: Spec) -> Any:
    """logits(address, thread): the head's scores of `rows` rows of normalised hidden states in `final`, in `logits`."""
    product = make_product(spec.target, spec.weights)
    encode_final = _make_encode_final(spec)
    is_float32 = spec.weights == "float32"

    @compiled
    def logits(address: int, thread: int) -> None:
        p = parameters_at(address)
        encode_final(p, thread)
        rows, stride = (p.final, p.hidden_stride) if is_float32 else (p.inputs, p.input_stride)
        product(
            p,
            head_of(p),
            linear_at(p.linears),
            thread,
            p.work,
            rows,
            stride,
            p.rows,
            p.input_notes,
            p.logits,
            p.logits_stride,
        )

    return logits


@cache
def make_greedy(spec: Spec) -> Any:
    """greedy(address, thread): the most likely word of each of `rows` rows of `final`, in `words`, or greedy.py's NO_WORD."""
    target, width = spec.target, spec.target.panel_width
    panel_sums, epilogue = (
        make_panel_sums(target, spec.weights),
        make_epilogue(target, spec.weights, kinds=(STORE,)),
    )
    clear_best, update_best, choose_best = (
        make_clear_best(target),
        make_update_best(target),
        make_choose_best(target),
    )
    encode_final = _make_encode_final(spec)
    is_float32 = spec.weights == "float32"
    row_bytes, width_bytes = best_bytes(target.lanes), width * WORD_BYTES

    @compiled
    def greedy(address: int, thread: int) -> None:
        p = parameters_at(address)
        head = head_of(p)
        best, sums = p.best + thread * p.rows * row_bytes, p.scratch + thread * p.scratch_bytes
        clear_best(best, p.rows)
        encode_final(p, thread)
        rows, stride = (p.final, p.hidden_stride) if is_float32 else (p.inputs, p.input_stride)
        for panel in range(
            head.panels * thread // p.threads, head.panels * (thread + 1) // p.threads
        ):
            column, following = panel * width, head.weight + (panel + 1) * head.steps * width_bytes
            first = 0
            while first < p.rows:
                done = group_rows(head, p.rows - first)
                panel_sums(head, panel, rows, stride, first, done, p.rows, sums, following)
                in_place = sums - column * WORD_BYTES  # the epilogue adds the column
                epilogue(
                    sums,
                    done,
                    head,
                    column,
                    in_place,
                    width_bytes,
                    p.input_notes + first * NOTES_BYTES,
                )
                for row in range(done):
                    update_best(
                        sums + row * width_bytes,
                        width,
                        column,
                        p.vocab,
                        best + (first + row) * row_bytes,
                    )
                first += done
        meet(p, 0 if is_float32 else p.threads)
        for row in range(p.rows * thread // p.threads, p.rows * (thread + 1) // p.threads):
            store_int(
                p.words, row, choose_best(p.best + row * row_bytes, p.threads, p.rows * row_bytes)
            )

    return greedy


@compiled
def head_of(p: Any) -> Any:
    """The record of the head, which comes after all layers."""
    return linear_at(p.linears + p.layers * LINEARS_PER_LAYER * _LINEAR_BYTES)


def _make_encode_final(spec: Spec) -> Any:
    encode_rows = _make_encode_rows(spec)
    is_float32 = spec.weights == "float32"

    @compiled
    def encode_final(p: Any, thread: int) -> None:
        """The rows of `final` as the head takes them, in `inputs`; float32 is taken as it is. Threads meet once, or not at all."""
        if not is_float32:
            begin, end = p.rows * thread // p.threads, p.rows * (thread + 1) // p.threads
            encode_rows(
                p, begin, end, p.final, p.hidden_stride, p.d_model, p.layers * LINEARS_PER_LAYER
            )
            meet(p, 0)

    return encode_final


@compiled
def meet(p: Any, reached: int) -> int:
    """Wait for all threads; `reached` counts the arrivals of all meetings so far, and so does what is given back."""
    reached += p.threads
    barrier(p.arrived, reached)
    return reached


def _make_embed(spec: Spec) -> Any:
    target = spec.target
    clear, copy, add, widen_row = (
        make_clear(target),
        make_copy(target),
        make_add(target),
        make_widen_row(target),
    )

    @compiled
    def embed(p: Any, begin: int, end: int) -> None:
        """hidden = token embedding + position embedding, for tokens begin to end; what fills the row up is zero and stays so."""
        for token in range(begin, end):
            hidden = p.hidden + token * p.hidden_stride
            clear(hidden, p.d_model)
            row = p.token_embedding + load_int(p.token_ids, token) * p.embedding_bytes
            if p.embedding_is_narrow:
                widen_row(row, hidden, p.d_model)
            else:
                copy(row, hidden, p.d_model)
            add(
                p.position_embedding + load_int(p.positions, token) * p.hidden_stride,
                hidden,
                p.d_model,
            )

    return embed


def _make_encode_rows(spec: Spec) -> Any:
    encode_input = make_encode_input(spec.target, spec.weights)

    @compiled
    def encode_rows(
        p: Any, begin: int, end: int, source: int, stride: int, count: int, number: int
    ) -> None:
        """Rows begin to end of `source` into `inputs`, as product number `number` takes them."""
        linear = linear_at(p.linears + number * _LINEAR_BYTES)
        for row in range(begin, end):
            encode_input(
                source + row * stride,
                count,
                linear,
                p.inputs + row * p.input_stride,
                p.input_notes + row * NOTES_BYTES,
            )

    return encode_rows


def _make_normalise(spec: Spec) -> Any:
    layer_norm, encode_input = (
        make_layer_norm(spec.target),
        make_encode_input(spec.target, spec.weights),
    )
    is_float32 = spec.weights == "float32"

    @compiled
    def normalise(
        p: Any, thread: int, begin: int, end: int, gain: int, bias: int, number: int
    ) -> None:
        """inputs = layer_norm(hidden), for tokens begin to end, as product number `number` takes them."""
        linear = linear_at(p.linears + number * _LINEAR_BYTES)
        for token in range(begin, end):
            out = p.inputs + token * p.input_stride
            row = out if is_float32 else p.row + thread * p.row_bytes
            layer_norm(p.hidden + token * p.hidden_stride, gain, bias, row, p.d_model, p.epsilon)
            if not is_float32:
                encode_input(row, p.d_model, linear, out, p.input_notes + token * NOTES_BYTES)

    return normalise


def _make_multiply(spec: Spec) -> Any:
    product = make_product(spec.target, spec.weights)

    @compiled
    def multiply(
        p: Any, thread: int, number: int, rows: int, stride: int, out: int, out_stride: int
    ) -> None:
        """Compute a thread's share of product number `number` of the network, counted through all layers, for all tokens."""
        at = p.linears + number * _LINEAR_BYTES
        linear, following = linear_at(at), linear_at(at + _LINEAR_BYTES)
        product(
            p,
            linear,
            following,
            thread,
            p.work + number * LINE_BYTES,
            rows,
            stride,
            p.tokens,
            p.input_notes,
            out,
            out_stride,
        )

    return multiply


def _make_store(spec: Spec) -> Any:
    encode_token, scatter = make_encode_token(spec.target, spec.cache), make_scatter(spec.target)
    per_word = cache_format(spec.target, spec.cache).per_word
    insert = make_insert(spec.target, per_word)

    @compiled
    def store_keys_and_values(p: Any, thread: int, layer: int) -> None:
        """Every token's key into a column, its value into a row of its block.

        The work is divided by heads: tokens that share words of the values are stored by one thread, in their order.
        """
        codes = p.row + thread * p.row_bytes
        for token in range(p.tokens):
            slot = load_int(p.slots, token)
            offset = slot % p.block_size
            blocks = (layer * p.blocks + slot // p.block_size) * p.heads
            for head in range(p.heads * thread // p.threads, p.heads * (thread + 1) // p.threads):
                key = p.qkv + token * p.qkv_stride + (p.d_model + head * p.head_dim) * WORD_BYTES
                place = blocks + head
                scale = (place * p.block_columns + offset) * WORD_BYTES
                encode_token(key, p.head_dim, codes, p.key_scales + scale)
                scatter(
                    codes,
                    p.keys + place * p.key_bytes + offset * WORD_BYTES,
                    p.block_columns * WORD_BYTES,
                    p.key_steps,
                )
                encode_token(
                    key + p.d_model * WORD_BYTES, p.head_dim, codes, p.value_scales + scale
                )
                words = (
                    p.values
                    + place * p.value_bytes
                    + offset // per_word * p.head_columns * WORD_BYTES
                )
                insert(codes, words, offset % per_word, p.head_columns)

    return store_keys_and_values


def _make_paged_attention(spec: Spec) -> Any:
    parts = AttentionParts(spec.target, spec.weights, spec.cache)
    attend_prompt, attend_token = (
        make_attend_prompt(spec.target, parts),
        make_attend_token(spec.target, parts),
    )

    @compiled
    def paged_attention(p: Any, thread: int, layer: int) -> None:
        """Every token's attention to its own sequence: decoding sequences whole, the last of them by groups of heads, prompts by pieces and heads.

        A whole sequence is read in the order of memory; groups let no thread wait long for another at the end.
        """
        work = p.work + (p.layers * LINEARS_PER_LAYER + layer * ATTENTION_COUNTERS) * LINE_BYTES
        groups = min(p.threads, p.heads)
        whole = max(0, p.decodes - 2 * p.threads)
        while True:
            item = atomic_add(work, 1)
            sequence, first_head, heads = item, 0, p.heads
            if item >= whole:
                sequence, group = whole + (item - whole) // groups, (item - whole) % groups
                first_head = p.heads * group // groups
                heads = p.heads * (group + 1) // groups - first_head
            if sequence >= p.decodes:
                break
            at = sequence * ITEM_FIELDS
            table = p.block_tables + load_int(p.decode_items, at) * p.max_blocks * INT_BYTES
            token = load_int(p.decode_items, at + 1)
            position = load_int(p.decode_items, at + 3)
            attend_token(
                p, thread, layer, first_head, heads, table, p.qkv + token * p.qkv_stride, position, p.mixed + token * p.hidden_stride
            )  # fmt: skip
        while True:
            item = atomic_add(work + LINE_BYTES, 1)
            if item >= p.chunks * p.heads:
                break
            at = item // p.heads * ITEM_FIELDS
            table = p.block_tables + load_int(p.chunk_items, at) * p.max_blocks * INT_BYTES
            token = load_int(p.chunk_items, at + 1)
            count, first = load_int(p.chunk_items, at + 2), load_int(p.chunk_items, at + 3)
            attend_prompt(
                p, thread, layer, item % p.heads, table, p.qkv + token * p.qkv_stride, count, first, p.mixed + token * p.hidden_stride
            )  # fmt: skip

    return paged_attention
