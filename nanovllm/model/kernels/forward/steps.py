"""Several greedy steps in one run: each computes the tokens that the step before has chosen.

A draft model's step is so short that what Python does between two of them counts.

A helper that comes late walks through phases that are done, while the record already describes a
later step. So a record must have the same number of items in each step, or fewer: every sequence
has one token in all of them.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import INT_BYTES
from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.forward.forward import make_forward
from nanovllm.model.kernels.forward.head import make_greedy
from nanovllm.model.kernels.forward.prepare import prepare_attention
from nanovllm.model.kernels.simd.memory import load_int, step_record_at, store_int
from nanovllm.model.kernels.threads.phase import ABORTED, make_phase


@cache
def make_greedy_steps(spec: Spec) -> Any:
    """Return greedy_steps(record_ptr, thread): `steps` steps of one token for each sequence.

    The record has the batch of the first. The tokens of each step are written to `drafted`, as
    `argmax_tokens`; a sequence without a token goes on with token 0. `is_refused` is set if the
    batch of a step is not valid, and the run ends there.
    """
    forward, greedy = make_forward(spec), make_greedy(spec)

    @compiled
    def one(_record: Any, _record_ptr: int, _step: int) -> int:
        return 1

    @compiled
    def prepare(record: Any, _thread: int, _item: int, record_ptr: int, step: int) -> None:
        if step > 0:
            advance(record)
        prepare_attention(record_ptr, 0)

    @compiled
    def keep(record: Any, _thread: int, _item: int, _record_ptr: int, step: int) -> None:
        for row in range(record.rows):
            token = load_int(record.argmax_tokens_ptr, row)
            store_int(record.drafted_ptr, step * record.rows + row, token)

    prepare_step, keep_tokens = make_phase(one, prepare), make_phase(one, keep)

    @compiled
    def greedy_steps(record_ptr: int, thread: int) -> None:
        record = step_record_at(record_ptr)
        phase, steps = record.phases_ptr, record.steps
        for step in range(steps):
            phase = prepare_step(record, thread, phase, record_ptr, step)
            if phase == ABORTED or record.is_refused != 0:
                return
            phase = forward(record_ptr, thread, phase)
            phase = greedy(record_ptr, thread, phase)
            phase = keep_tokens(record, thread, phase, record_ptr, step)

    return greedy_steps


@compiled
def advance(record: Any) -> None:
    """Make the batch of the next step: each sequence's chosen token, at its next position."""
    for row in range(record.seqs):
        position = load_int(record.context_lens_ptr, row)
        index, offset = position // record.block_size, position % record.block_size
        table_ptr = record.block_tables_ptr + row * record.max_blocks * INT_BYTES
        block = load_int(table_ptr, min(index, record.max_blocks - 1))
        store_int(record.token_ids_ptr, row, max(load_int(record.argmax_tokens_ptr, row), 0))
        store_int(record.positions_ptr, row, position)
        store_int(record.slots_ptr, row, block * record.block_size + offset)
        store_int(record.context_lens_ptr, row, position + 1)
