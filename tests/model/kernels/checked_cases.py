"""Steps in which every address is checked: run by test_bounds.py with NANOVLLM_CHECK=1, and not collected otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.model.checkpoint import load_weights
from nanovllm.model.config import GPT2Config
from nanovllm.model.kernels.parameters import PARAMETERS
from nanovllm.model.kernels.target import CHECKS_ADDRESSES, Spec, Target, host_target
from nanovllm.model.numba_backend import NumbaBackend
from nanovllm.model.rows import RowSettings
from nanovllm.runner.row_samplers import row_settings
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint
from tests.support.sampling import Row, make_sampling

assert CHECKS_ADDRESSES, "run these with NANOVLLM_CHECK=1"

HOST = host_target()
SPECS = [
    Spec(HOST, "float32", "int8"), Spec(HOST, "bfloat16", "float32"), Spec(HOST, "int8", "bfloat16"), Spec(Target(lanes=4), "int8", "int8")
]  # fmt: skip
"""Each type of weights and of the cache, and vectors of another width."""

SHAPES: list[dict[str, Any]] = [
    {"n_embd": 64, "n_head": 8, "vocab_size": 64},  # rows end where panels do, heads are narrower than vectors
    {"n_embd": 128, "n_head": 2, "n_inner": 256, "vocab_size": 128},
    {"n_embd": 27, "n_head": 3, "n_inner": 37, "activation_function": "relu"},
    {"n_embd": 40, "n_head": 1, "n_inner": 5, "n_layer": 1, "vocab_size": 65},
    {"n_embd": 1, "n_head": 1, "n_inner": 1, "n_layer": 1, "vocab_size": 1},
]
FULL = 64  # tokens that fill the buffers to the end


def steps(backend: NumbaBackend, block_size: int) -> list[np.ndarray]:
    """Prompts, then decodes beside a prompt, then decodes alone; every step but the last fills the buffers, and so does the cache in the end."""
    config = backend.config
    lengths = [27, 1, 2, 34]
    seqs = [np.arange(length + 37) * 7 % config.vocab for length in lengths]
    blocks = [-(-(length + 37) // block_size) for length in lengths]
    ids = np.split(np.random.default_rng(0).permutation(sum(blocks)), np.cumsum(blocks)[:-1])
    tables = [part.tolist() for part in ids]
    backend.allocate_cache(sum(blocks), block_size)
    backend.fill_blocks(list(range(sum(blocks))), np.nan)
    cuts = [[0] * 4, lengths, [lengths[0] + 34, *(length + 10 for length in lengths[1:])], [length + 37 for length in lengths]]
    found = []
    for before, after in zip(cuts, cuts[1:], strict=False):
        now = [seq[:end] for seq, end in zip(seqs, after, strict=True)]
        batch = make_batch(now, computed=before, block_size=block_size, block_tables=tables, all_rows=True)
        hidden = backend.forward(batch)
        found.append(np.array(backend.logits(hidden)))
        words, has_word = backend.greedy(hidden)
        assert has_word.all()
        np.testing.assert_array_equal(words, found[-1].argmax(axis=1))
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("config", SHAPES, ids=lambda config: f"{config['n_embd']}-{config['n_head']}")
def test_whole_steps_stay_inside_their_arrays(tmp_path: Path, spec: Spec, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.model.numba_backend._SHARED_PRODUCTS", 0)
    folder = write_checkpoint(tmp_path, config=config)
    read = GPT2Config.load(folder)
    for threads, block_size in ((1, 16), (3, 5), (2, 1)):
        for narrow in (False, True):
            backend = NumbaBackend(read, load_weights(folder, read), spec=spec, narrow_embedding=narrow, num_threads=threads)
            for logits in steps(backend, block_size):
                assert np.isfinite(logits).all()
            backend.close()
