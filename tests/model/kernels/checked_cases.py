"""Steps with checked addresses; test_bounds.py runs them with NANOVLLM_CHECK=1."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.families.registry import load_config
from nanovllm.model.kernels.backend import NumbaBackend
from nanovllm.model.kernels.build.bounds import watch
from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES, KernelTarget, Spec, host_target
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.numpy_backend import NumpyBackend
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint
from tests.support.sampling import Row, make_sampling

assert CHECKS_ADDRESSES, "run these with NANOVLLM_CHECK=1"

HOST = host_target()
SPECS = [
    Spec(HOST, "float32", "int8"),
    Spec(HOST, "bfloat16", "float32"),
    Spec(KernelTarget(lanes=4), "int8", "bfloat16"),
]
"""Each type of weights and of the cache once, and two vector widths: compiling takes long."""

SHAPES: list[dict[str, Any]] = [
    {
        "n_embd": 64,
        "n_head": 8,
        "vocab_size": 64,
    },  # rows end where panels do, heads are narrower than vectors
    {"n_embd": 128, "n_head": 2, "n_inner": 256, "vocab_size": 128},
    {"n_embd": 27, "n_head": 3, "n_inner": 37, "activation_function": "relu"},
    {"n_embd": 40, "n_head": 1, "n_inner": 5, "n_layer": 1, "vocab_size": 65},
    {"n_embd": 48, "n_head": 48, "n_layer": 1},  # more heads than PREFILL_QUERIES
    {"n_embd": 1, "n_head": 1, "n_inner": 1, "n_layer": 1, "vocab_size": 1},
    {"model_type": "qwen2", "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    {
        "model_type": "qwen3",
        "hidden_size": 66,
        "head_dim": 34,
        "num_attention_heads": 28,  # more than PREFILL_QUERIES, for one head of keys
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    },
    {"model_type": "mistral", "hidden_size": 64, "sliding_window": 19, "intermediate_size": 3},
]
LENGTHS, GROWN = (
    [27, 1, 2, 34],
    37,
)  # prompts that fill the buffers together, and the tokens that each grows by
LONGEST = max(LENGTHS) + GROWN  # all positions of the network


def steps(backend: NumbaBackend | NumpyBackend, block_size: int) -> list[np.ndarray]:
    """Return the logits of four steps: prompts, a decode among prompts, the same again, decodes.

    The first two fill the buffers. The last two reach the end of the context and of the cache.
    """
    config = backend.config
    seqs = [np.arange(length + GROWN) * 7 % config.vocab for length in LENGTHS]
    blocks = [-(-len(seq) // block_size) for seq in seqs]
    ids = np.split(np.random.default_rng(0).permutation(sum(blocks)), np.cumsum(blocks)[:-1])
    tables = [part.tolist() for part in ids]
    backend.allocate_cache(sum(blocks), block_size)
    backend.fill_blocks(list(range(sum(blocks))), np.nan)
    ends = [[0] * 4, LENGTHS, [43, 2, 37, 46], [63, 37, 38, 70], [len(seq) for seq in seqs]]
    logits = []
    for before, after in itertools.pairwise(ends):
        now = [seq[:end] for seq, end in zip(seqs, after, strict=True)]
        batch = make_batch(
            now, computed=before, block_size=block_size, block_tables=tables, all_rows=True
        )
        hidden = backend.forward(batch).copy()
        logits.append(np.array(backend.logits(hidden)))
        tokens, has_token = backend.greedy(hidden)
        assert has_token.all()
        np.testing.assert_array_equal(tokens, logits[-1].argmax(axis=1))
    many = np.resize(hidden, (193, config.d_model))
    tokens, _ = backend.greedy(many)
    np.testing.assert_array_equal(tokens, backend.logits(many).argmax(axis=1))
    return logits


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(
    "config", SHAPES, ids=lambda config: "-".join(map(str, list(config.values())[:2]))
)
def test_whole_steps_stay_inside_their_arrays(
    tmp_path: Path, spec: Spec, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In networks of some width, their results are also those of NumPy, near enough."""
    monkeypatch.setattr("nanovllm.model.kernels.backend._SHARED_MULTIPLY_ADDS", 0)
    folder = write_checkpoint(
        tmp_path, config={"n_positions": LONGEST, "max_position_embeddings": LONGEST, **config}
    )
    read = load_config(folder)
    exact = steps(NumpyBackend.load(folder), 16) if read.d_model >= 64 else []
    for threads, block_size, narrow in ((1, 16, False), (3, 5, True), (2, 1, False), (1, 5, True)):
        backend = NumbaBackend(
            read,
            load_weights(folder, read),
            spec=spec,
            narrow_embedding=narrow,
            num_threads=threads,
        )
        ours = steps(backend, block_size)
        assert all(np.isfinite(logits).all() for logits in ours)
        for logits, expected in zip(ours, exact, strict=False):
            assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
        backend.close()


def change(values: np.ndarray, place: int, value: int) -> np.ndarray:
    """Return a copy with one number replaced."""
    changed = values.copy()
    changed.flat[place] = value
    return changed


BATCH = make_batch(
    [[1, 2, 3]] * 20 + [[4, 5, 6, 7]], block_size=4, all_rows=True
)  # 64 tokens in 21 blocks
# A slot that is a little wrong leads out of four arrays, in places into a neighbouring array, which
# is not detected. So which array is reported first depends on the heap.
BROKEN: dict[str, tuple[str, Callable[[ForwardBatch], ForwardBatch]]] = {
    "slot beyond": ("wrote", lambda batch: replace(batch, slots=change(batch.slots, -1, 21 * 4))),
    "slot far beyond": (
        "wrote",
        lambda batch: replace(batch, slots=change(batch.slots, 5, 1 << 40)),
    ),
    "slot below": ("wrote", lambda batch: replace(batch, slots=change(batch.slots, 0, -4))),
    "block beyond": (
        "read .* keys",
        lambda batch: replace(batch, block_tables=change(batch.block_tables, -1, 21)),
    ),
    "token beyond": (
        "read .* token_embedding",
        lambda batch: replace(batch, token_ids=change(batch.token_ids, 7, 64)),
    ),
    "position beyond": (
        "read .* position_embedding",
        lambda batch: replace(batch, positions=change(batch.positions, 63, 71)),
    ),
    "row beyond": (
        "read .* hidden",
        lambda batch: replace(batch, logit_rows=change(batch.logit_rows, 0, 64)),
    ),
}


@pytest.fixture
def backend(tmp_path_factory: pytest.TempPathFactory) -> NumbaBackend:
    folder = write_checkpoint(
        tmp_path_factory.mktemp("model"), config={"n_positions": LONGEST, **SHAPES[0]}
    )
    config = load_config(folder)
    backend = NumbaBackend(config, load_weights(folder, config), spec=SPECS[0], num_threads=1)
    backend.allocate_cache(21, 4)
    return backend


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_batch_is_reported_and_the_next_one_runs(
    backend: NumbaBackend, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check before a step would refuse such a batch, so it is broken after the check."""
    expected = backend.forward(BATCH).copy()
    message, break_batch = BROKEN[name]
    run, broken = backend._run, break_batch(BATCH)  # noqa: SLF001 - what is patched just below

    def run_broken(function: str, products: int) -> None:
        fields = ("token_ids", "positions", "slots", "logit_rows", "block_tables")
        backend.memory.fill(**{field: getattr(broken, field) for field in fields})
        run(function, products)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "_run", run_broken)
        with pytest.raises(RuntimeError, match=f"forward {message}"):
            backend.forward(BATCH)
    actual = backend.forward(BATCH)
    if name not in {
        "slot beyond",
        "slot below",
    }:  # some of these accesses hit a neighbouring array, undetected
        np.testing.assert_array_equal(actual, expected)


ARRAYS = [
    "hidden",
    "inputs",
    "qkv",
    "attn_out",
    "ffn_hidden",
    "final",
    "keys",
    "values",
    "key_scales",
    "value_scales",
    "final_gain",
    "bias of a linear layer",
]


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_is_too_short_is_reported(
    backend: NumbaBackend, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last element of its first axis is missing."""

    def watch_less(
        target: KernelTarget, entry: str, arrays: Iterable[tuple[str, np.ndarray]]
    ) -> Any:
        return watch(
            target,
            entry,
            [(other, array[:-1] if other == name else array) for other, array in arrays],
        )

    with monkeypatch.context() as patch:
        patch.setattr("nanovllm.model.kernels.backend.watch", watch_less)
        with pytest.raises(RuntimeError, match=r"forward (read|wrote)"):
            backend.forward(BATCH)
    backend.forward(BATCH)


def test_the_report_names_address_size_and_place(
    backend: NumbaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []

    def watch_less(
        target: KernelTarget, entry: str, arrays: Iterable[tuple[str, np.ndarray]]
    ) -> Any:
        less = {name: array[:-1] if name == "hidden" else array for name, array in arrays}
        if entry == "forward":
            ends.append((less["hidden"].ctypes.data + less["hidden"].nbytes, less["hidden"].nbytes))
        return watch(target, entry, less.items())

    monkeypatch.setattr("nanovllm.model.kernels.backend.watch", watch_less)
    with pytest.raises(RuntimeError) as caught:
        backend.forward(BATCH)
    ((end, size),) = ends
    expected = (
        f"forward wrote {4 * HOST.lanes} bytes at address {end:#x}, "
        f"{size} bytes from the beginning of hidden, which has {size} bytes; "
    )
    assert str(caught.value).startswith(expected)


def test_a_token_beyond_the_vocabulary_is_reported_by_the_sampler(backend: NumbaBackend) -> None:
    logits = backend.logits(backend.forward(BATCH))
    backend.sampler.sample(logits[:2], make_sampling([Row(bias={63: 1.0}), Row()]))
    with pytest.raises(RuntimeError, match="sample_rows read 4 bytes"):
        backend.sampler.sample(logits[:2], make_sampling([Row(bias={10**9: 1.0}), Row()]))


def double(v: Vectors, numbers: Value, count: Value) -> None:
    """Double numbers, in whole vectors."""
    with v.range(count, v.lanes) as i:
        at = v.element(numbers, i)
        v.store(v.load(at) + v.load(at), at)


def test_a_kernel_that_goes_one_vector_too_far_is_caught_and_does_no_harm() -> None:
    double_kernel = kernel(HOST, double)

    @compiled
    def run(numbers: int, count: int) -> None:
        double_kernel(numbers, count)

    def checked_run(numbers: np.ndarray, count: int) -> None:
        with watch(HOST, "double", [("numbers", numbers)]):
            run(numbers.ctypes.data, count)

    memory = aligned_zeros(64)
    memory[:] = 1.0
    numbers, behind = memory[:32], memory[32:]
    checked_run(numbers, 32)
    end = numbers.ctypes.data + 32 * WORD_BYTES
    with pytest.raises(
        RuntimeError,
        match=f"double read {HOST.lanes * WORD_BYTES} bytes at address {end:#x}.*; 3 accesses",
    ):
        checked_run(numbers, 32 + HOST.lanes)
    assert (numbers == 4.0).all()
    assert (behind == 1.0).all()
    with pytest.raises(
        RuntimeError, match="double read"
    ):  # an access that begins inside and ends outside
        checked_run(numbers[:31], 32)
