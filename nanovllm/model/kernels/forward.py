"""The compiled forward pass: the operations of nanovllm/model/gpt2.py under the same names in the same order.

Several threads enter it at once, each with its number. An operation is divided among them, and between two operations they wait for
each other, since the second reads what the first wrote. Which thread computes a row, a panel or a head changes nothing about how it is
computed.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.attention import make_attend_prompt, make_attend_token
from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.layernorm import make_layer_norm
from nanovllm.model.kernels.layout import F32_BYTES, LINE_BYTES
from nanovllm.model.kernels.matmul import make_product
from nanovllm.model.kernels.memory import INT_BYTES, load_int, make_add, make_clear, make_copy, make_scatter, parameters_at
from nanovllm.model.kernels.parameters import ADD_TO_RESIDUAL, ITEM_FIELDS, STORE, WORK_COUNTERS_PER_LAYER
from nanovllm.model.kernels.threads import atomic_add, barrier, has_failed


@cache
def make_forward(lanes: int) -> Any:
    """forward(address, thread): a whole step, from token ids to the normalised hidden state of the wanted rows, in `normed`."""
    product = make_product(lanes)
    layer_norm = make_layer_norm(lanes)
    normalise = _make_normalise(lanes)
    embed = _make_embed(lanes)
    store_keys_and_values = _make_store(lanes)
    paged_attention = _make_paged_attention(lanes)

    @compiled
    def forward(address: int, thread: int) -> None:
        p = parameters_at(address)
        threads = p.threads
        begin, end = p.tokens * thread // threads, p.tokens * (thread + 1) // threads
        scratch = p.scratch + thread * p.scratch_bytes
        reached = 0
        embed(p, begin, end)
        for layer in range(p.layers):
            if has_failed(p.arrived):
                return
            work = p.work + layer * WORK_COUNTERS_PER_LAYER * LINE_BYTES
            row = layer * p.hidden_stride
            normalise(p, begin, end, p.attention_gain + row, p.attention_bias + row)
            reached += threads
            barrier(p.arrived, reached)
            product(
                thread, threads, work, p.normed, p.hidden_stride, p.tokens, p.qkv_weight + layer * p.qkv_stride * p.d_model, p.d_model,
                3 * p.d_model, p.qkv_bias + layer * p.qkv_stride, p.qkv, p.qkv_stride, STORE, scratch,
            )  # fmt: skip
            reached += threads
            barrier(p.arrived, reached)
            store_keys_and_values(p, thread, layer)
            reached += threads
            barrier(p.arrived, reached)
            paged_attention(p, thread, layer, work + LINE_BYTES)
            reached += threads
            barrier(p.arrived, reached)
            product(
                thread, threads, work + 3 * LINE_BYTES, p.mixed, p.hidden_stride, p.tokens, p.out_weight + row * p.d_model, p.d_model,
                p.d_model, p.out_bias + row, p.hidden, p.hidden_stride, ADD_TO_RESIDUAL, scratch,
            )  # fmt: skip
            reached += threads
            barrier(p.arrived, reached)
            normalise(p, begin, end, p.ffn_gain + row, p.ffn_bias + row)
            reached += threads
            barrier(p.arrived, reached)
            product(
                thread, threads, work + 4 * LINE_BYTES, p.normed, p.hidden_stride, p.tokens, p.up_weight + layer * p.middle_stride * p.d_model,
                p.d_model, p.d_ff, p.up_bias + layer * p.middle_stride, p.middle, p.middle_stride, p.activation, scratch,
            )  # fmt: skip
            reached += threads
            barrier(p.arrived, reached)
            product(
                thread, threads, work + 5 * LINE_BYTES, p.middle, p.middle_stride, p.tokens, p.down_weight + row * p.d_ff, p.d_ff,
                p.d_model, p.down_bias + row, p.hidden, p.hidden_stride, ADD_TO_RESIDUAL, scratch,
            )  # fmt: skip
            reached += threads
            barrier(p.arrived, reached)
        for wanted in range(p.rows * thread // threads, p.rows * (thread + 1) // threads):
            source = p.hidden + load_int(p.logit_rows, wanted) * p.hidden_stride
            layer_norm(source, p.final_gain, p.final_bias, p.normed + wanted * p.hidden_stride, p.d_model, p.epsilon)

    return forward


@cache
def make_logits(lanes: int) -> Any:
    """logits(address, thread): the head's scores of the first `rows` rows of `normed`, in `logits`."""
    product = make_product(lanes)

    @compiled
    def logits(address: int, thread: int) -> None:
        p = parameters_at(address)
        product(
            thread, p.threads, p.work, p.normed, p.hidden_stride, p.rows, p.head_weight, p.d_model, p.vocab, p.zeros, p.logits,
            p.logits_stride, STORE, p.scratch + thread * p.scratch_bytes,
        )  # fmt: skip

    return logits


def _make_embed(lanes: int) -> Any:
    clear, copy, add = make_clear(lanes), make_copy(lanes), make_add(lanes)

    @compiled
    def embed(p: Any, begin: int, end: int) -> None:
        """hidden = token embedding + position embedding, for tokens begin to end; what fills the row up is zero and stays so."""
        row_bytes = p.d_model * F32_BYTES
        for token in range(begin, end):
            hidden = p.hidden + token * p.hidden_stride
            position = p.normed + token * p.hidden_stride
            clear(hidden, p.hidden_stride // F32_BYTES)
            clear(position, p.hidden_stride // F32_BYTES)
            copy(p.token_embedding + load_int(p.token_ids, token) * row_bytes, hidden, p.d_model)
            copy(p.position_embedding + load_int(p.positions, token) * row_bytes, position, p.d_model)
            add(position, hidden, p.d_model)

    return embed


def _make_normalise(lanes: int) -> Any:
    layer_norm = make_layer_norm(lanes)

    @compiled
    def normalise(p: Any, begin: int, end: int, gain: int, bias: int) -> None:
        """normed = layer_norm(hidden), for tokens begin to end."""
        for token in range(begin, end):
            at = token * p.hidden_stride
            layer_norm(p.hidden + at, gain, bias, p.normed + at, p.d_model, p.epsilon)

    return normalise


def _make_store(lanes: int) -> Any:
    copy, scatter = make_copy(lanes), make_scatter(lanes)

    @compiled
    def store_keys_and_values(p: Any, thread: int, layer: int) -> None:
        """Every token's key into a column, its value into a row of its block; the work is divided by tokens and heads."""
        row_bytes = p.d_model * F32_BYTES
        items = p.tokens * p.heads
        for item in range(items * thread // p.threads, items * (thread + 1) // p.threads):
            token = item // p.heads
            head = item % p.heads
            slot = load_int(p.slots, token)
            offset = slot % p.block_size
            block = (layer * p.blocks + slot // p.block_size) * p.heads + head
            key = p.qkv + token * p.qkv_stride + row_bytes + head * p.head_dim * F32_BYTES
            scatter(key, p.keys + block * p.key_bytes + offset * F32_BYTES, p.block_columns * F32_BYTES, p.head_dim)
            copy(key + row_bytes, p.values + block * p.value_bytes + offset * p.head_columns * F32_BYTES, p.head_dim)

    return store_keys_and_values


def _make_paged_attention(lanes: int) -> Any:
    attend_prompt, attend_token = make_attend_prompt(lanes), make_attend_token(lanes)

    @compiled
    def paged_attention(p: Any, thread: int, layer: int, work: int) -> None:
        """Every token's attention to its own sequence: decoding sequences by groups of heads, pieces of prompts by single heads."""
        keys = p.keys + layer * p.blocks * p.heads * p.key_bytes
        values = p.values + layer * p.blocks * p.heads * p.value_bytes
        scale = p.scales + layer * F32_BYTES
        scratch = p.scratch + thread * p.scratch_bytes
        scores = p.scores + thread * p.scores_bytes
        groups = min(p.threads, p.heads)
        while True:
            item = atomic_add(work, 1)
            if item >= p.decodes * groups:
                break
            first_head = p.heads * (item % groups) // groups
            heads = p.heads * (item % groups + 1) // groups - first_head
            at = item // groups * ITEM_FIELDS
            table = p.block_tables + load_int(p.decode_items, at) * p.max_blocks * INT_BYTES
            token = load_int(p.decode_items, at + 1)
            column = first_head * p.head_dim * F32_BYTES
            attend_token(
                p, p.qkv + token * p.qkv_stride + column, heads, load_int(p.decode_items, at + 3), keys + first_head * p.key_bytes,
                values + first_head * p.value_bytes, table, scale, p.mixed + token * p.hidden_stride + column, scores, scratch,
            )  # fmt: skip
        while True:
            item = atomic_add(work + LINE_BYTES, 1)
            if item >= p.chunks * p.heads:
                break
            head = item % p.heads
            at = item // p.heads * ITEM_FIELDS
            table = p.block_tables + load_int(p.chunk_items, at) * p.max_blocks * INT_BYTES
            token = load_int(p.chunk_items, at + 1)
            column = head * p.head_dim * F32_BYTES
            attend_prompt(
                p, p.qkv + token * p.qkv_stride + column, load_int(p.chunk_items, at + 2), load_int(p.chunk_items, at + 3),
                keys + head * p.key_bytes, values + head * p.value_bytes, table, scale, p.mixed + token * p.hidden_stride + column, scores, scratch,
            )  # fmt: skip

    return paged_attention
