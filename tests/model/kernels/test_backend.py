"""The compiled backend as a whole: vector widths, numbers of threads, and its thread pool."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.model.backend import LoadOptions
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.families.registry import load_config
from nanovllm.model.kernels.backend import NumbaBackend
from nanovllm.model.kernels.build.target import KernelTarget, Spec
from nanovllm.model.kernels.library import load_library
from nanovllm.model.numpy_backend import NumpyBackend
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint
from tests.support.targets import HOST, TILES, WHOLE_TARGETS, load_whole

BLOCK_SIZE = 8
SEQS = [list(range(1, 41)), [7], [9, 8, 7], list(range(90, 30, -1))]


def logits_of(backend: Any) -> np.ndarray:
    backend.allocate_cache(40, BLOCK_SIZE)
    backend.fill_blocks(list(range(40)), np.nan)
    return np.array(
        backend.logits(backend.forward(make_batch(SEQS, block_size=BLOCK_SIZE, all_rows=True)))
    )


SHAPES: list[dict[str, Any]] = [
    {},
    {"n_embd": 40, "n_head": 8, "n_inner": 56},
    {"n_embd": 48, "n_head": 1, "activation_function": "gelu"},
    {"n_embd": 27, "n_head": 3, "n_inner": 37, "activation_function": "sigmoid"},
    {"model_type": "llama", "hidden_size": 40, "num_attention_heads": 6, "head_dim": 10},
    {"model_type": "mistral", "sliding_window": 9, "num_key_value_heads": 4},
    {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 24, "intermediate_size": 70},
]


@pytest.mark.parametrize("target", WHOLE_TARGETS)
@pytest.mark.parametrize("config", SHAPES)
def test_every_vector_width_agrees_with_numpy(
    tmp_path: Path, target: KernelTarget, config: dict[str, Any]
) -> None:
    folder = write_checkpoint(tmp_path, config=config)
    read = load_config(folder)
    load_whole(target)
    ours = logits_of(NumbaBackend(read, load_weights(folder, read), spec=Spec(target)))
    np.testing.assert_allclose(ours, logits_of(NumpyBackend.load(folder)), rtol=0, atol=1e-4)


NARROW = [
    ("bfloat16", None, "auto"),
    ("float32", "int8", "auto"),
    ("bfloat16", "int8", "int8"),
]
"""Each type of weights and of the cache; checked_cases.py has other pairs, which it compiles."""


def load_narrow(folder: Path, kind: tuple[str, str | None, str], **options: Any) -> NumbaBackend:
    dtype, quantization, cache = kind
    return NumbaBackend.load(
        folder, LoadOptions(dtype=dtype, quantization=quantization, kv_cache_dtype=cache, **options)
    )


@pytest.mark.slow(60)  # where nothing was compiled before
@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("config", SHAPES)
def test_narrow_types_are_near_float32(
    tmp_path: Path, kind: tuple[str, str | None, str], config: dict[str, Any]
) -> None:
    folder = write_checkpoint(tmp_path, config=config)
    exact, ours = logits_of(NumpyBackend.load(folder)), logits_of(load_narrow(folder, kind))
    assert np.isfinite(ours).all()
    assert np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()
    assert not np.array_equal(ours, exact)


AUTO = {
    ("float32", None): "float32",
    ("bfloat16", None): "bfloat16",
    ("float32", "int8"): "bfloat16",
    ("bfloat16", "int8"): "bfloat16",
}


@pytest.mark.parametrize("weights", AUTO)
def test_the_caches_type_follows_from_that_of_the_weights(
    tmp_path: Path, weights: tuple[str, str | None]
) -> None:
    dtype, quantization = weights
    backend = NumbaBackend.load(
        write_checkpoint(tmp_path),
        LoadOptions(dtype=dtype, quantization=quantization, num_threads=1),
    )
    assert (backend.weight_dtype, backend.cache_dtype, backend.num_threads) == (
        quantization or dtype,
        AUTO[weights],
        1,
    )


@pytest.mark.parametrize("kind", [("float32", None, "auto"), *NARROW])
@pytest.mark.parametrize("config", SHAPES)
def test_a_sequences_bits_depend_on_nothing_else(
    tmp_path: Path,
    kind: tuple[str, str | None, str],
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone, batched, token by token, in chunks, in other blocks, on 1 or 3 threads: same bits."""
    monkeypatch.setattr("nanovllm.model.kernels.backend._SHARED_MULTIPLY_ADDS", 0)
    folder = write_checkpoint(tmp_path, config=config)
    together = np.split(
        logits_of(load_narrow(folder, kind, num_threads=3)),
        np.cumsum([len(seq) for seq in SEQS])[:-1],
    )
    backend = load_narrow(folder, kind, num_threads=1)
    for seq, expected in zip(SEQS, together, strict=True):
        for cuts in ([len(seq)], list(range(1, len(seq) + 1)), [*range(5, len(seq), 7), len(seq)]):
            backend.allocate_cache(40, BLOCK_SIZE)
            backend.fill_blocks(list(range(40)), np.nan)
            blocks = [(11 * block + 5) % 40 for block in range(-(-len(seq) // BLOCK_SIZE))]
            done, rows = 0, []
            for cut in cuts:
                batch = make_batch(
                    [seq[:cut]],
                    computed=[done],
                    block_size=BLOCK_SIZE,
                    block_tables=[blocks],
                    all_rows=True,
                )
                rows.append(np.array(backend.logits(backend.forward(batch))))
                done = cut
            np.testing.assert_array_equal(np.concatenate(rows), expected)


@pytest.mark.parametrize("kind", [("float32", None, "auto"), *NARROW])
def test_bits_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, kind: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with more threads than processors, and than items of most phases."""
    monkeypatch.setattr("nanovllm.model.kernels.backend._SHARED_MULTIPLY_ADDS", 0)
    folder = write_checkpoint(tmp_path)
    expected = logits_of(load_narrow(folder, kind, num_threads=1))
    last = np.cumsum([len(seq) for seq in SEQS]) - 1
    for threads in (2, 5, 8, 16):
        backend = load_narrow(folder, kind, num_threads=threads)
        np.testing.assert_array_equal(logits_of(backend), expected)
        tokens, _ = backend.greedy(backend.forward(make_batch(SEQS, block_size=BLOCK_SIZE)))
        np.testing.assert_array_equal(tokens, expected[last].argmax(axis=1))


@pytest.mark.slow(25)
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("config", SHAPES)
def test_a_pass_by_the_tile_unit_has_the_bits_of_each_sequence_alone(
    tmp_path: Path, weights: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With int8, they are also those of the dot products."""
    monkeypatch.setattr("nanovllm.model.kernels.backend._SHARED_MULTIPLY_ADDS", 0)
    folder = write_checkpoint(tmp_path, config=config)
    read = load_config(folder)

    def load(target: KernelTarget, threads: int) -> NumbaBackend:
        spec = Spec(target, weights, "bfloat16")
        return NumbaBackend(read, load_weights(folder, read), spec=spec, num_threads=threads)

    together, vectors = logits_of(load(TILES, 3)), logits_of(load(HOST.without_tiles, 2))
    if weights == "int8":
        np.testing.assert_array_equal(together, vectors)
    assert np.abs(together - vectors).max() < 0.05 * np.abs(vectors).max()
    tiles, done = load(TILES, 1), 0
    for seq in SEQS:
        tiles.allocate_cache(40, BLOCK_SIZE)
        batch = make_batch([seq], block_size=BLOCK_SIZE, all_rows=True)
        alone = tiles.logits(tiles.forward(batch))
        np.testing.assert_array_equal(alone, together[done : done + len(seq)])
        done += len(seq)


BAD_TOKEN, PLACE = 49, 30
KINDS = [
    *(Spec(target) for target in WHOLE_TARGETS),
    Spec(HOST, "bfloat16", "bfloat16"),
    Spec(HOST, "int8", "bfloat16"),
    Spec(HOST, "int8", "int8"),
    Spec(TILES, "bfloat16", "bfloat16"),
]


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_spoils_only_what_comes_after_it(
    tmp_path: Path, spec: Spec, bad: float
) -> None:
    """At every vector width and type, and for what comes in the same blocks and buffers later."""
    if spec == Spec(spec.target):
        load_whole(spec.target)
    folder = write_checkpoint(tmp_path, tied=False, config={"n_embd": 36})
    config = load_config(folder)
    weights = load_weights(folder, config)
    weights.token_embedding[BAD_TOKEN, 5] = bad
    backend = NumbaBackend(config, weights, spec=spec, num_threads=1)
    beside = list(range(90, 30, -1))
    beside.remove(BAD_TOKEN)

    def run(token: int) -> np.ndarray:
        seqs = [[*range(1, 1 + PLACE), token, *range(50, 59)], beside, [7]]
        hidden = backend.forward(make_batch(seqs, block_size=BLOCK_SIZE, all_rows=True)).copy()
        _, has_token = backend.greedy(hidden)
        logits = np.array(backend.logits(hidden))
        np.testing.assert_array_equal(np.isfinite(logits).all(axis=1), has_token)
        return logits

    backend.allocate_cache(40, BLOCK_SIZE)
    expected = run(BAD_TOKEN - 1)
    assert np.isfinite(expected).all()
    spoilt = np.zeros(len(expected), dtype=np.bool_)
    spoilt[PLACE : PLACE + 10] = True
    actual = run(BAD_TOKEN)
    assert not np.isfinite(actual[spoilt]).any()
    np.testing.assert_array_equal(actual[~spoilt], expected[~spoilt])
    np.testing.assert_array_equal(run(BAD_TOKEN - 1), expected)


@pytest.mark.parametrize("name", ["relu", "relu2", "relu6", "leaky_relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_activation_hides_a_weight_that_is_not_a_number(
    tmp_path: Path, name: str, dtype: str
) -> None:
    folder = write_checkpoint(tmp_path, config={"activation_function": name})
    config = load_config(folder)
    weights = load_weights(folder, config)
    weights.layers[0].up.weight[3, 5] = np.nan
    backend = NumbaBackend(config, weights, spec=Spec(HOST, dtype, dtype), num_threads=1)
    backend.allocate_cache(4, BLOCK_SIZE)
    _, has_token = backend.greedy(backend.forward(make_batch([[1, 2, 3]], block_size=BLOCK_SIZE)))
    assert not has_token.any()


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_the_head_leaves_the_hidden_states_as_they_were(tmp_path: Path, cache: str) -> None:
    """They are a view of the backend's memory, and an int8 head has outliers to leave out."""
    folder = write_checkpoint(tmp_path, outliers=True, config={"n_embd": 64})
    backend = NumbaBackend.load(folder, LoadOptions(quantization="int8", kv_cache_dtype=cache))
    backend.allocate_cache(40, BLOCK_SIZE)
    batch = make_batch(SEQS, block_size=BLOCK_SIZE, all_rows=True)
    hidden = backend.forward(batch)
    before = hidden.copy()
    tokens, _ = backend.greedy(hidden)
    np.testing.assert_array_equal(hidden, before)
    first = np.array(backend.logits(hidden))
    np.testing.assert_array_equal(first.argmax(axis=1), tokens)
    np.testing.assert_array_equal(backend.logits(hidden), first)
    np.testing.assert_array_equal(hidden, before)
    assert backend.memory.arrays["linears"]["outliers"][-1] > 0, "there is nothing to leave out"


@pytest.mark.parametrize("change", ["overwritten", "cut short"])
@pytest.mark.parametrize("kind", [NumbaBackend, NumpyBackend])
def test_a_file_that_changes_while_it_is_served_changes_nothing(
    tmp_path: Path, kind: type[NumbaBackend | NumpyBackend], change: str
) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    backend = kind.load(tmp_path)
    expected = logits_of(backend)
    with path.open("r+b") as file:
        if change == "overwritten":
            file.write(bytes(path.stat().st_size))
        else:
            file.truncate(0)
    np.testing.assert_array_equal(logits_of(backend), expected)


def test_types_are_refused_by_the_option_that_they_do_not_belong_to(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    for options in ({"dtype": "int8"}, {"quantization": "float32"}, {"kv_cache_dtype": "float16"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}='"):
            NumbaBackend.load(folder, LoadOptions(**options))  # type: ignore[arg-type]


def test_a_second_model_of_another_size_compiles_nothing(tmp_path: Path) -> None:
    logits_of(NumbaBackend.load(write_checkpoint(tmp_path / "one")))
    before = load_library.cache_info()
    logits_of(
        NumbaBackend.load(
            write_checkpoint(
                tmp_path / "two",
                config={"n_embd": 40, "n_head": 5, "n_layer": 3, "activation_function": "relu"},
            )
        )
    )
    after = load_library.cache_info()
    assert after.misses == before.misses
    assert after.hits == before.hits + 1


def test_a_window_of_more_tokens_than_any_text_has_is_none(tmp_path: Path) -> None:
    one, other = (
        NumbaBackend.load(
            write_checkpoint(
                tmp_path / str(window), config={"model_type": "mistral", "sliding_window": window}
            )
        )
        for window in (10**30, None)
    )
    np.testing.assert_array_equal(logits_of(one), logits_of(other))


def test_indices_outside_are_refused_before_any_kernel_runs(tmp_path: Path) -> None:
    backend = NumbaBackend.load(write_checkpoint(tmp_path))
    backend.allocate_cache(2, BLOCK_SIZE)
    with pytest.raises(ValueError, match="slots run from"):
        backend.forward(make_batch([[1, 2]], block_size=BLOCK_SIZE, block_tables=[[2]]))
    with pytest.raises(ValueError, match="token_ids run from"):
        backend.forward(make_batch([[1, 10**6]], block_size=BLOCK_SIZE))


def test_a_backend_that_is_dropped_takes_its_threads_with_it(tmp_path: Path) -> None:
    before = threading.active_count()
    for _ in range(5):
        backend = NumbaBackend.load(write_checkpoint(tmp_path), LoadOptions(num_threads=3))
        del backend
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_networks_side_by_side_share_threads_where_the_first_has_as_many_layers(
    tmp_path: Path,
) -> None:
    folders = {
        layers: write_checkpoint(tmp_path / str(layers), config={"n_layer": layers})
        for layers in (1, 2)
    }
    own = {
        layers: NumbaBackend.load(folder, LoadOptions(num_threads=3))
        for layers, folder in folders.items()
    }
    for layers, other in ((1, 2), (2, 1)):
        before = threading.active_count()
        beside = NumbaBackend.load(folders[layers], LoadOptions(beside=own[other], num_threads=2))
        helpers = 0 if layers < other else 1
        assert beside.num_threads == 3 - helpers
        assert threading.active_count() == before + helpers
        seen: list[str] = []

        def observe(function: str, _moments: np.ndarray, into: list[str] = seen) -> None:
            into.append(function)

        own[other].time_runs(observe)
        assert np.array_equal(logits_of(beside), logits_of(own[layers]))
        assert not seen, "runs of another network are not observed"
        logits_of(own[other])
        assert seen == ["forward", "logits"]
        own[other].time_runs(None)
        del beside
    assert np.array_equal(logits_of(own[2]), logits_of(own[2])), "its threads are still there"
