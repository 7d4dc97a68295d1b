"""Rotary positions: queries and keys of one token, normalized and turned in place.

The twin of nanovllm/model/rotary.py, with cosines and sines from a table:

    rotary  [max_positions][cosines of all pairs, sines of all pairs], float32
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.layernorm import make_normalize_head
from nanovllm.model.kernels.simd.elements import map_elements
from nanovllm.model.kernels.simd.kernel import kernel_maker
from nanovllm.model.kernels.simd.memory import load_int
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors


@kernel_maker()
def make_turn_head(v: Vectors, head_ptr: Value, angles_ptr: Value, pairs: Value) -> None:
    """Return turn_head(head_ptr, angles_ptr, pairs): turn the pairs of a head's numbers, in place.

    head_ptr    float32 [2, pairs]
    angles_ptr  cosines and sines, float32 [2, pairs]
    """
    heads = [head_ptr, v.element(head_ptr, pairs)]
    angles = [angles_ptr, v.element(angles_ptr, pairs)]

    def turn(first: Value, second: Value, cos: Value, sin: Value) -> list[Value]:
        return [first * cos - second * sin, second * cos + first * sin]

    map_elements(v, pairs, [*heads, *angles], heads, turn)


def make_turn_heads(target: KernelTarget) -> Any:
    """Return turn_heads(record, layer, token, head): a head's key and the queries that share it.

    It changes nothing in networks whose positions are embeddings.
    """
    turn_head, normalize_head = make_turn_head(target), make_normalize_head(target)

    @compiled
    def turn_heads(record: Any, layer: int, token: int, head: int) -> None:
        if record.rotary_ptr == 0:
            return
        head_bytes = record.head_dim * WORD_BYTES
        token_ptr = record.qkv_ptr + token * record.qkv_stride_bytes
        position = load_int(record.positions_ptr, token)
        angles_ptr = record.rotary_ptr + position * head_bytes
        for query in range(head * record.sharing, (head + 1) * record.sharing):
            query_ptr = token_ptr + query * head_bytes
            prepare(record, layer, query_ptr, record.query_gain_ptr, angles_ptr)
        key_ptr = token_ptr + (record.heads + head) * head_bytes
        prepare(record, layer, key_ptr, record.key_gain_ptr, angles_ptr)

    @compiled
    def prepare(record: Any, layer: int, head_ptr: int, gain_ptr: int, angles_ptr: int) -> None:
        if gain_ptr != 0:
            gain_ptr += layer * record.head_dim * WORD_BYTES
            normalize_head(head_ptr, gain_ptr, record.head_dim, record.epsilon_ptr)
        turn_head(head_ptr, angles_ptr, record.head_dim // 2)

    return turn_heads
