"""The sum of token and position embeddings, and their gradients.

A token may be in a batch many times. So an item of the backward pass is a strip of columns: one
thread adds the strip of all rows, in order, and no two threads add to the same gradient.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import map_elements
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.move import load_int, record_at
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.threads.barrier import take_item
from nanovllm.training.kernels.records import ITEM_ROWS, RECORDS, STRIP

_forward_record_at = record_at(RECORDS["embed"])
_backward_record_at = record_at(RECORDS["embed_backward"])


def make_embed(target: KernelTarget) -> Any:
    """Return the entry embed(record_ptr, thread); see NumpyOperations.embed."""
    add = kernel(target, _add)

    @compiled
    def embed(record_ptr: int, thread: int) -> None:
        record = _forward_record_at(record_ptr)
        row_bytes = record.d_model * WORD_BYTES
        first = take_item(record.phases_ptr) * ITEM_ROWS
        while first < record.rows:
            for row in range(first, min(first + ITEM_ROWS, record.rows)):
                token = load_int(record.token_ids_ptr, row)
                add(
                    record.token_embedding_ptr + token * row_bytes,
                    record.position_embedding_ptr + row % record.context * row_bytes,
                    record.out_ptr + row * row_bytes,
                    record.d_model,
                )
            first = take_item(record.phases_ptr) * ITEM_ROWS

    return embed


def make_embed_backward(target: KernelTarget) -> Any:
    """Return the entry embed_backward(record_ptr, thread).

    `grad_position_embedding_ptr` may be 0.
    """
    add = kernel(target, _add)

    @compiled
    def embed_backward(record_ptr: int, thread: int) -> None:
        record = _backward_record_at(record_ptr)
        row_bytes = record.d_model * WORD_BYTES
        first = take_item(record.phases_ptr) * STRIP
        while first < record.d_model:
            count, offset_bytes = min(STRIP, record.d_model - first), first * WORD_BYTES
            for row in range(record.rows):
                grad_ptr = record.grad_out_ptr + row * row_bytes + offset_bytes
                token = load_int(record.token_ids_ptr, row)
                token_ptr = record.grad_token_embedding_ptr + token * row_bytes + offset_bytes
                add(token_ptr, grad_ptr, token_ptr, count)
                if record.grad_position_embedding_ptr != 0:
                    position_bytes = row % record.context * row_bytes + offset_bytes
                    position_ptr = record.grad_position_embedding_ptr + position_bytes
                    add(position_ptr, grad_ptr, position_ptr, count)
            first = take_item(record.phases_ptr) * STRIP

    return embed_backward


def _add(v: Vectors, a_ptr: Value, b_ptr: Value, out_ptr: Value, count: Value) -> None:
    """Emit out = a + b."""
    map_elements(v, count, (a_ptr, b_ptr), (out_ptr,), lambda a, b: [a + b])
