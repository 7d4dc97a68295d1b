"""The compiled forward pass: the operations of nanovllm/model/families in the same order.

All threads of a run call `forward`, each with its own index, and share the work of every operation
(threads/phase.py). An operation takes the address of its phase and returns that of the next one.

A linear layer takes its input rows in the type of its weights (`KernelTarget.input_type`):

    float32   the rows as they are; so do bfloat16 weights without dot products of bfloat16
    bfloat16  converted by the operation that computes the rows
    int8      quantized when the whole row is known, from which its scale follows: by layer_norm,
              where one thread computes a row, but by an operation of their own after attention and
              the activation, where several threads do

Rows of hidden, gains, biases and position embeddings are float32 [d_model], padded with zeros to
whole panels, so they share the stride hidden_stride_bytes.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled, outlined
from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.forward.attention import make_paged_attention
from nanovllm.model.kernels.forward.convert import make_convert_row, make_widen_row
from nanovllm.model.kernels.forward.kv_cache import make_store
from nanovllm.model.kernels.forward.layernorm import make_normalize_row
from nanovllm.model.kernels.forward.matmul import LINEAR_BYTES, make_linear
from nanovllm.model.kernels.simd.memory import (
    linear_at,
    load_int,
    make_add,
    make_clear,
    make_copy,
    step_record_at,
)
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.step_record import (
    ATTENTION_OUT,
    DOWN,
    LINEARS_PER_LAYER,
    QKV,
    RESIDUAL,
    ROW_QUANT_BYTES,
    STORE,
    UP,
)
from nanovllm.model.kernels.threads.phase import count_of, make_phase, make_row_phase


@cache
def make_forward(spec: Spec) -> Any:
    """Return forward(record_ptr, thread, phase) -> next phase: final hidden states of a batch.

    record_ptr  address of the arguments (step_record.py)
    thread      index of the calling thread
    phase       the first that it goes through (phase.py)

    The result [rows, d_model] is in the record's array `final`, a row for each of `logit_rows`. The
    keys and values of the batch's tokens are written to the cache.
    """
    embed, layer_norm, final_norm = _make_embed(spec), _make_layer_norm(spec), _make_final(spec)
    store_keys_and_values, paged_attention = make_store(spec), make_paged_attention(spec)
    linear, quantize = make_linear(spec.target, spec.weights), make_convert_inputs(spec)
    is_int8 = spec.weights == "int8"

    @outlined
    def forward(record_ptr: int, thread: int, phase: int) -> int:
        record = step_record_at(record_ptr)
        tokens, stride_bytes = record.tokens, record.hidden_stride_bytes
        hidden = Rows(record.hidden_ptr, stride_bytes)
        attn_out = Rows(record.attn_out_ptr, record.attn_out_stride_bytes)
        inputs = Rows(record.inputs_ptr, record.inputs_stride_bytes)
        qkv_rows = Rows(record.qkv_ptr, record.qkv_stride_bytes)
        ffn_hidden = Rows(record.ffn_hidden_ptr, record.ffn_hidden_stride_bytes)
        phase = embed(record, thread, phase)
        for layer in range(record.layers):
            norm_bytes = layer * stride_bytes  # from the gain or bias of layer 0 to this one
            # Indices of linear layers; `attention_out` is the one that takes the rows `attn_out`.
            qkv, attention_out, up, down = linear_indices(layer)

            # norm(hidden) @ qkv_weight + qkv_bias -> qkv
            gain_ptr = record.attention_gain_ptr + norm_bytes
            bias_ptr = record.attention_bias_ptr + norm_bytes
            phase = layer_norm(record, thread, phase, gain_ptr, bias_ptr, qkv)
            phase = linear(record, thread, phase, qkv, tokens, inputs, qkv_rows, STORE)

            # attention(queries, keys, values) -> attn_out
            phase = store_keys_and_values(record, thread, phase, layer)
            phase = paged_attention(record, thread, phase, layer)

            # hidden + attn_out @ out_weight + out_bias -> hidden
            rows = attn_out
            if is_int8:
                d_in, rows = record.queries_width, inputs
                phase = quantize(record, thread, phase, attention_out, tokens, d_in, attn_out)
            phase = linear(record, thread, phase, attention_out, tokens, rows, hidden, RESIDUAL)

            # activation(norm(hidden) @ up_weight + up_bias) -> ffn_hidden, gated or not
            gain_ptr, bias_ptr = record.ffn_gain_ptr + norm_bytes, record.ffn_bias_ptr + norm_bytes
            phase = layer_norm(record, thread, phase, gain_ptr, bias_ptr, up)
            activation = record.activation
            phase = linear(record, thread, phase, up, tokens, inputs, ffn_hidden, activation)

            # hidden + ffn_hidden @ down_weight + down_bias -> hidden
            rows = ffn_hidden
            if is_int8:
                d_in, rows = record.d_ff, inputs
                phase = quantize(record, thread, phase, down, tokens, d_in, ffn_hidden)
            phase = linear(record, thread, phase, down, tokens, rows, hidden, RESIDUAL)

        # norm(hidden[logit_rows]) -> final
        return int(final_norm(record, thread, phase))

    return forward


@compiled
def linear_indices(layer: int) -> tuple[int, int, int, int]:
    """Return the indices of a transformer block's four linear layers among those of all blocks."""
    first = layer * LINEARS_PER_LAYER
    return first + QKV, first + ATTENTION_OUT, first + UP, first + DOWN


def _make_embed(spec: Spec) -> Any:
    target = spec.target
    clear, copy, add = make_clear(target), make_copy(target), make_add(target)
    widen_row = make_widen_row(target)

    @compiled
    def embed(record: Any, _thread: int, token: int) -> None:
        """hidden = token_embedding[token_ids] + position_embedding[positions], if there is one."""
        hidden_ptr = record.hidden_ptr + token * record.hidden_stride_bytes
        token_id = load_int(record.token_ids_ptr, token)
        row_ptr = record.token_embedding_ptr + token_id * record.embedding_stride_bytes
        clear(hidden_ptr, record.d_model)  # the padding of the last vector must be 0
        if record.embedding_is_bfloat16:
            widen_row(row_ptr, hidden_ptr, record.d_model)
        else:
            copy(row_ptr, hidden_ptr, record.d_model)
        if record.position_embedding_ptr != 0:
            position_bytes = load_int(record.positions_ptr, token) * record.hidden_stride_bytes
            add(record.position_embedding_ptr + position_bytes, hidden_ptr, record.d_model)

    return make_row_phase(count_of("tokens"), embed)


def _make_layer_norm(spec: Spec) -> Any:
    """Return layer_norm(record, thread, phase, gain_ptr, bias_ptr, index) -> next phase.

    gain_ptr, bias_ptr  float32 [d_model], padded to whole vectors
    index               index of the linear layer that takes the result as its input rows
    """
    normalize_row = make_normalize_row(spec.target)
    convert_row = make_convert_row(spec.target, spec.weights)
    is_float32 = spec.inputs == "float32"

    @compiled
    def layer_norm(
        record: Any, thread: int, token: int, gain_ptr: int, bias_ptr: int, index: int
    ) -> None:
        """inputs = norm(hidden), in the type that the linear layer takes."""
        hidden_ptr = record.hidden_ptr + token * record.hidden_stride_bytes
        inputs_ptr = record.inputs_ptr + token * record.inputs_stride_bytes
        # Normalized in float32; for other types in the thread's own row, then converted.
        row_ptr = inputs_ptr if is_float32 else record.row_ptr + thread * record.row_bytes
        normalize_row(
            hidden_ptr,
            gain_ptr,
            bias_ptr,
            row_ptr,
            record.d_model,
            record.epsilon_ptr,
            record.is_rms,
        )
        if not is_float32:
            linear = linear_at(record.linears_ptr + index * LINEAR_BYTES)
            row_quant_ptr = record.row_quant_ptr + token * ROW_QUANT_BYTES
            convert_row(row_ptr, record.d_model, linear, inputs_ptr, row_quant_ptr)

    return make_row_phase(count_of("tokens"), layer_norm)


def _make_final(spec: Spec) -> Any:
    normalize_row = make_normalize_row(spec.target)

    @compiled
    def final_norm(record: Any, _thread: int, row: int) -> None:
        """final = norm(hidden[logit_rows])."""
        token = load_int(record.logit_rows_ptr, row)
        normalize_row(
            record.hidden_ptr + token * record.hidden_stride_bytes,
            record.final_gain_ptr,
            record.final_bias_ptr,
            record.final_ptr + row * record.hidden_stride_bytes,
            record.d_model,
            record.epsilon_ptr,
            record.is_rms,
        )

    return make_phase(count_of("rows"), final_norm)


@cache
def make_convert_inputs(spec: Spec) -> Any:
    """Return convert_inputs, an operation: record.inputs = rows, as bfloat16 or quantized to int8.

    Its arguments are:

    index        index of the linear layer that takes the result as its input rows
    count, d_in  number and length of the rows
    rows         the rows, float32
    """
    convert_row = make_convert_row(spec.target, spec.weights)

    @compiled
    def count_rows(_record: Any, _index: int, count: int, _d_in: int, _rows: Any) -> int:
        return count

    @compiled
    def convert_inputs(
        record: Any, _thread: int, row: int, index: int, _count: int, d_in: int, rows: Any
    ) -> None:
        linear = linear_at(record.linears_ptr + index * LINEAR_BYTES)
        inputs_ptr = record.inputs_ptr + row * record.inputs_stride_bytes
        row_quant_ptr = record.row_quant_ptr + row * ROW_QUANT_BYTES
        convert_row(rows.ptr + row * rows.stride_bytes, d_in, linear, inputs_ptr, row_quant_ptr)

    return make_row_phase(count_rows, convert_inputs)
