"""The sum of token and position embeddings, and their gradients.

A token may be in a batch many times. So an item of the backward pass is a strip of columns: one
thread adds the strip of all rows, in order, and no two threads add to the same gradient.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.memory import load_int, make_add, make_copy
from nanovllm.training.kernels.phases import Work, make_operation, split
from nanovllm.training.kernels.records import ITEM_ROWS, STRIP


def make_embed(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.embed."""
    copy, add = make_copy(target), make_add(target)

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        row_bytes = record.d_model * WORD_BYTES
        for row in range(item * ITEM_ROWS, min((item + 1) * ITEM_ROWS, record.rows)):
            token = load_int(record.token_ids_ptr, row)
            position_ptr = record.position_embedding_ptr + row % record.context * row_bytes
            out_ptr = record.out_ptr + row * row_bytes
            copy(record.token_embedding_ptr + token * row_bytes, out_ptr, record.d_model)
            add(position_ptr, out_ptr, record.d_model)

    return make_operation("embed", [Work(split("rows", ITEM_ROWS), compute)])


def make_embed_backward(target: KernelTarget) -> Any:
    """Return the entry of NumpyOperations.embed_backward.

    `grad_position_embedding_ptr` may be 0.
    """
    add = make_add(target)

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        row_bytes = record.d_model * WORD_BYTES
        first = item * STRIP
        count, offset_bytes = min(STRIP, record.d_model - first), first * WORD_BYTES
        for row in range(record.rows):
            grad_ptr = record.grad_out_ptr + row * row_bytes + offset_bytes
            token = load_int(record.token_ids_ptr, row)
            token_ptr = record.grad_token_embedding_ptr + token * row_bytes + offset_bytes
            add(grad_ptr, token_ptr, count)
            if record.grad_position_embedding_ptr != 0:
                position_bytes = row % record.context * row_bytes + offset_bytes
                position_ptr = record.grad_position_embedding_ptr + position_bytes
                add(grad_ptr, position_ptr, count)

    return make_operation("embed_backward", [Work(split("d_model", STRIP), compute)])
