"""NaN and infinities in every kernel: they propagate as in NumPy, and reach no other row.

A kernel that loses a NaN serves text that looks right; one that spreads it ends other requests.
"""

import itertools

import numpy as np
import pytest

from nanovllm.model import activation
from nanovllm.model.attention import attention_scores, softmax, weighted_sum
from nanovllm.model.kernels.build.layout import JOB, PHASE_BYTES, THREAD_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros, pack_rows, panel_steps, round_up
from nanovllm.model.kernels.build.target import CACHE_TYPES, PER_WORD, KernelTarget, Spec
from nanovllm.model.kernels.record import KernelMemory
from nanovllm.model.kernels.step_record import (
    ACTIVATION_NAMES,
    ITEM_FIELDS,
    PREFILL_QUERIES,
    STEP_DTYPES,
    STEP_RECORD,
)
from nanovllm.model.layers import layer_norm
from nanovllm.model.weights import LayerNorm
from tests.model.kernels.forward.test_kernels import call, finish
from tests.support.arrays import numbers
from tests.support.batches import make_batch
from tests.support.kernel_entries import attention_kernel
from tests.support.targets import HOST

NAN, INF = np.float32(np.nan), np.float32(np.inf)
BITS = np.array(
    [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC001FF],
    dtype=np.uint32,
)
"""NaN of either sign and several payloads, as in overwritten files."""
SPECIAL = np.array([NAN, INF, -INF, 1e38, -1e38, 1e20, -1e20, 89, -89, 9, -9], dtype=np.float32)


def kinds_of(values: np.ndarray) -> np.ndarray:
    """Return NaN and infinities as they are, and 0 for finite numbers."""
    return np.where(np.isfinite(values), 0, values)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activations_give_what_numpy_gives(target: KernelTarget, name: str) -> None:
    values = np.resize(np.concatenate([SPECIAL, BITS.view(np.float32)]), 128)
    with np.errstate(all="ignore"):
        expected = getattr(activation, name)(values)
    kind, width = ACTIVATION_NAMES.index(name), target.panel_width
    actual = np.concatenate([finish(target, kind, part) for part in values.reshape(-1, width)])
    np.testing.assert_array_equal(kinds_of(actual), kinds_of(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 39])
def test_layer_norm_of_a_row_that_is_not_finite_is_nan(
    target: KernelTarget, bad: np.float32, place: int
) -> None:
    count = 40
    hidden, gain, bias = (pack_rows([numbers(count, seed=seed)], 64)[0] for seed in range(3))
    hidden[place] = bad
    out, epsilon = aligned_zeros(hidden.size), np.array([1e-5], dtype=np.float32)
    addresses = [array.ctypes.data for array in (hidden, gain, bias, out)]
    call(target, "normalize_row", *addresses, count, epsilon.ctypes.data, 0)
    with np.errstate(invalid="ignore"):
        expected = layer_norm(hidden[None, :count], LayerNorm(gain[:count], bias[:count]), 1e-5)
    np.testing.assert_array_equal(kinds_of(out[:count]), kinds_of(expected[0]))
    assert np.isnan(out[:count]).all()


@pytest.mark.parametrize(
    "bad",
    [{0: NAN}, {22: NAN}, {5: INF}, {5: -INF}, {5: INF, 6: -INF}, dict.fromkeys(range(23), -INF)],
    ids=str,
)
@pytest.mark.parametrize("narrow", [False, True])
def test_softmax_gives_what_numpy_gives(
    target: KernelTarget, bad: dict[int, np.float32], *, narrow: bool
) -> None:
    visible, blocks, block_size = 23, 3, 8
    columns = round_up(block_size, target.lanes)
    row = numbers(visible)
    row[list(bad)] = list(bad.values())
    scores = np.full((blocks, columns), NAN, dtype=np.float32)
    scores[:, :block_size].reshape(-1)[:visible] = row
    padded = np.full(blocks * block_size, NAN, dtype=np.float32)
    padded[:visible] = row
    scores[:, :block_size] = padded.reshape(blocks, block_size)
    scale, inv_sum = np.array([0.5], dtype=np.float32), np.zeros(1, dtype=np.float32)
    addresses = scale.ctypes.data, inv_sum.ctypes.data
    sizes = (0, visible, blocks, block_size, columns)
    name = "softmax_to_bfloat16" if narrow else "softmax"
    call(target, name, scores.ctypes.data, *sizes, *addresses)
    weights = scores
    if narrow:
        bits = scores.view(np.uint16).reshape(-1)[: scores.size].astype(np.uint32)
        weights = (bits << np.uint32(16)).view(np.float32).reshape(scores.shape)
    assert not weights[:, block_size:].any(), "a masked weight is exactly zero"
    with np.errstate(invalid="ignore"):
        actual = weights[:, :block_size].reshape(-1) * inv_sum[0]
        expected = np.exp(row * scale - (row * scale).max())
        expected /= expected.sum(dtype=np.float32)
    np.testing.assert_array_equal(np.isnan(actual[:visible]), np.isnan(expected))
    if np.isfinite(expected).all():
        np.testing.assert_allclose(actual[:visible], expected, rtol=1e-2, atol=1e-6)
        assert not actual[visible:].any()


def test_rounding_to_bfloat16_keeps_every_nan(target: KernelTarget) -> None:
    values = np.resize(BITS, 35).view(np.float32)
    out = np.zeros(values.size, dtype=np.uint16)
    call(target, "round_row", values.ctypes.data, out.ctypes.data, values.size)
    assert np.isnan((out.astype(np.uint32) << np.uint32(16)).view(np.float32)).all()


@pytest.mark.parametrize("bad", [*BITS.view(np.float32), INF, -INF])
def test_a_row_of_bytes_that_is_not_finite_has_nan_for_its_scale(
    target: KernelTarget, bad: np.float32
) -> None:
    for place in (0, 36):
        source, ones = aligned_zeros(64), np.ones(64, dtype=np.float32)
        source[:37] = numbers(37)
        source[place] = bad
        out, row_quant = np.zeros(64, dtype=np.uint16), np.zeros(32, dtype=np.float32)
        addresses = [array.ctypes.data for array in (source, ones, out, row_quant)]
        call(target, "quantize_row", *addresses, 37)
        assert np.isnan(row_quant[0])
        scale = np.zeros(1, dtype=np.float32)
        call(target, "quantize_signed", source.ctypes.data, out.ctypes.data, scale.ctypes.data, 37)
        assert np.isnan(scale[0])


# Attention --------------------------------------------------------------------------------------

# For this CPU alone, since compiling takes seconds; test_backend.py has the other vector widths.

HEADS, BLOCK_SIZE, CONTEXT = 3, 5, PREFILL_QUERIES + 13


class Attention:
    """store_keys_and_values and paged_attention, for one target and type of cache."""

    def __init__(
        self, target: KernelTarget, cache: str, head_dim: int, window: int = CONTEXT
    ) -> None:
        self.target, self.cache, self.head_dim = target, cache, head_dim
        self.run = attention_kernel(Spec(target, "float32", cache))
        self.blocks = -(-CONTEXT // BLOCK_SIZE)
        d_model, per_word = HEADS * head_dim, PER_WORD[cache]
        columns, head_columns = round_up(BLOCK_SIZE, target.lanes), round_up(head_dim, target.lanes)
        key_words = panel_steps(head_dim, per_word) * columns
        value_words = panel_steps(BLOCK_SIZE, per_word) * head_columns
        self.memory = memory = KernelMemory(STEP_RECORD, STEP_DTYPES)
        memory.set(
            threads=1, layers=1, d_model=d_model, heads=HEADS, head_dim=head_dim, vocab=1, seqs=1,
            max_positions=CONTEXT, blocks=self.blocks, max_blocks=self.blocks,
            block_size=BLOCK_SIZE, block_columns=columns, head_columns=head_columns,
            key_steps=panel_steps(head_dim, per_word),
            key_block_bytes=key_words * 4, value_block_bytes=value_words * 4,
            kv_heads=HEADS, sharing=1, queries_width=d_model, window=window,
            chunk_tokens=PREFILL_QUERIES,
            qkv_stride_bytes=3 * d_model * 4, attn_out_stride_bytes=d_model * 4,
            query_stride_bytes=round_up(head_dim, 16) * 4,
        )  # fmt: skip
        self.d_model = d_model
        sizes = {"keys": key_words, "values": value_words, "key_scales": columns}
        sizes["value_scales"] = columns
        for name, words in sizes.items():
            array = aligned_zeros(self.blocks * HEADS * words)
            array[:] = NAN
            memory.bind(**{name: array})
        memory.bind(
            scores=aligned_zeros(PREFILL_QUERIES * self.blocks * columns),
            scratch=aligned_zeros((PREFILL_QUERIES + 1) * head_columns),
            queries=aligned_zeros(PREFILL_QUERIES * round_up(head_dim, 16)),
            row=aligned_zeros(round_up(head_dim, 16)),
            attention_scales=np.array([head_dim**-0.5], dtype=np.float32),
        )
        job_bytes = JOB.itemsize + THREAD_BYTES
        self._job = aligned_zeros((job_bytes + 2 * PHASE_BYTES) // 4)
        self.phases = self._job[job_bytes // 4 :]
        memory.set(job=self._job.ctypes.data, phases=self.phases.ctypes.data)
        memory.reserve("decode_items", ITEM_FIELDS)
        memory.reserve("chunk_items", (CONTEXT // PREFILL_QUERIES + 1) * ITEM_FIELDS)

    def attend(self, qkv: np.ndarray, cuts: list[int]) -> np.ndarray:
        """Return outputs [context, heads, head_dim] of a sequence, computed cut by cut."""
        outputs = []
        for start, stop in itertools.pairwise([0, *cuts]):
            batch = make_batch([range(stop)], computed=[start], block_size=BLOCK_SIZE)
            memory, tokens = self.memory, stop - start
            table = np.arange(self.blocks, dtype=np.int64)[None, ::-1]
            slots = table[0, batch.positions // BLOCK_SIZE] * BLOCK_SIZE
            memory.set(tokens=tokens, rows=0)
            memory.fill(
                token_ids=np.zeros(tokens, dtype=np.int64), positions=batch.positions,
                slots=slots + batch.positions % BLOCK_SIZE, logit_rows=batch.logit_rows,
                query_starts=batch.query_starts, context_lens=batch.context_lens,
                block_tables=table,
            )  # fmt: skip
            attn_out = aligned_zeros(tokens * self.d_model)
            memory.bind(qkv=np.ascontiguousarray(qkv[start:stop]), attn_out=attn_out)
            self.phases[:] = 0
            self.run(memory.address, 0)
            assert not memory["is_refused"]
            outputs.append(attn_out.reshape(tokens, HEADS, self.head_dim).copy())
        return np.concatenate(outputs)


CUTS = {
    "whole": [CONTEXT],
    "in odd pieces": [7, 8, 30, CONTEXT],
    "token by token": list(range(1, CONTEXT + 1)),
}


def sound_outputs(qkv: np.ndarray, head_dim: int, window: int) -> np.ndarray:
    """Return whether each query's output is finite in each head, by NumPy, query by query."""
    queries, keys, values = qkv.reshape(CONTEXT, 3, HEADS, head_dim).transpose(1, 0, 2, 3)
    with np.errstate(invalid="ignore"):
        weights = softmax(attention_scores(queries, keys, head_dim**-0.5, window))
        out = weighted_sum(weights, values, window)
    return np.array(np.isfinite(out).all(axis=2))


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 24])
@pytest.mark.parametrize("window", [CONTEXT, 9])
def test_attention_keeps_a_token_from_those_that_do_not_see_it(
    cache_type: str, head_dim: int, window: int
) -> None:
    """They keep their bits, before it and a window later; the others are what NumPy computes."""
    clean = numbers(CONTEXT, 3 * HEADS * head_dim, seed=head_dim)
    kernels = Attention(HOST, cache_type, head_dim, window)
    expected = kernels.attend(clean, CUTS["whole"])
    assert np.isfinite(expected).all()
    for part, bad, place in itertools.product(range(3), (NAN, INF, -INF), (0, 11, 31)):
        qkv = clean.copy()
        qkv[place, (part * HEADS + 1) * head_dim + head_dim // 2] = bad  # of the second head
        sound = sound_outputs(qkv, head_dim, window)
        is_blind = np.ones_like(sound)
        is_blind[place : place + (1 if part == 0 else window), 1] = False
        assert sound[is_blind].all()
        if cache_type == "int8" and part > 0:
            sound = is_blind  # a byte could not tell: the whole key or value is NaN
        for name, cuts in CUTS.items():
            actual = kernels.attend(qkv, cuts)
            told = f"part {part}, {bad} at {place}, {name}"
            np.testing.assert_array_equal(np.isfinite(actual).all(axis=2), sound, err_msg=told)
            np.testing.assert_array_equal(actual[is_blind], expected[is_blind], err_msg=told)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("head_dim", [1, 7])
def test_a_sequence_leaves_no_nan_to_the_next(cache_type: str, head_dim: int) -> None:
    clean = numbers(CONTEXT, 3 * HEADS * head_dim, seed=1)
    kernels = Attention(HOST, cache_type, head_dim)
    for cuts in CUTS.values():
        expected = kernels.attend(clean, cuts)
        kernels.attend(np.full_like(clean, NAN), cuts)
        np.testing.assert_array_equal(kernels.attend(clean, cuts), expected)
