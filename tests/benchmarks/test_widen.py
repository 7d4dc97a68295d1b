"""A widened checkpoint computes the same function, and is written whole or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import widen
from nanovllm.errors import CheckpointError
from nanovllm.model.families.registry import load_config
from nanovllm.model.logprobs import log_softmax
from nanovllm.model.numpy_backend import NumpyBackend
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint, write_tiny_model


def logprobs(folder: Path, token_ids: list[int]) -> np.ndarray:
    """Return the log-probabilities of every token after each of a sequence."""
    backend = NumpyBackend.load(folder)
    backend.allocate_cache(8, 16)
    hidden = backend.forward(make_batch([token_ids], block_size=16, all_rows=True))
    return log_softmax(backend.logits(hidden))


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"config": {"n_embd": 21, "n_head": 3, "n_inner": 10}},
        {"tied": False, "prefix": False, "dtype": "F16"},
        {"config": {"scale_attn_by_inverse_layer_idx": True}, "shards": 2, "buffers": True},
    ],
    ids=["tiny", "odd sizes", "untied", "shards"],
)
def test_the_log_probabilities_are_equal(
    options: dict[str, Any], factor: int, tmp_path: Path
) -> None:
    original = write_checkpoint(tmp_path / "original", **options)
    wide = widen.widen(original, factor, tmp_path / "wide")
    before, after = load_config(original), load_config(wide)
    assert (after.d_model, after.heads, after.d_ff) == (
        factor * before.d_model,
        factor * before.heads,
        factor * before.d_ff,
    )
    assert after.head_dim == before.head_dim
    token_ids = np.random.default_rng(factor).integers(before.vocab, size=50).tolist()
    expected = logprobs(original, token_ids)
    assert np.ptp(expected) > 5  # the predictions are far from uniform
    np.testing.assert_allclose(logprobs(wide, token_ids), expected, rtol=0, atol=2e-4)


def test_all_files_but_the_weights_are_copied(tmp_path: Path) -> None:
    original = write_tiny_model(tmp_path / "original", shards=2)
    (original / "generation_config.json").write_text('{"temperature": 0.5}', encoding="utf-8")
    (original / "README.md").write_text("the original", encoding="utf-8")
    wide = tmp_path / "new" / "wide"
    assert widen.main([str(original), "2", str(wide)]) == 0
    assert {path.name for path in wide.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    for name in ("generation_config.json", "tokenizer.json"):
        assert (wide / name).read_bytes() == (original / name).read_bytes()
    config = json.loads((wide / "config.json").read_text(encoding="utf-8"))
    assert config["n_embd"] == 64
    assert [path.name for path in wide.parent.iterdir()] == ["wide"]


def test_a_wrong_factor_and_an_existing_folder_are_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="the factor is 0 but must be at least 1"):
        widen.widen(tiny_model, 0, tmp_path / "wide")
    with pytest.raises(FileExistsError, match="exists; give a new folder"):
        widen.widen(tiny_model, 2, tmp_path)
    for flags in ([str(tiny_model), "0", "wide"], [str(tiny_model), "2", str(tmp_path)]):
        with pytest.raises(SystemExit):
            widen.main(flags)
    errors = capsys.readouterr().err
    assert "argument factor: 0 must be" in errors
    assert f"{tmp_path} exists" in errors
    assert not list(tmp_path.iterdir())


def test_an_incomplete_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original")
    (original / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        widen.widen(original, 2, tmp_path / "wide")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
