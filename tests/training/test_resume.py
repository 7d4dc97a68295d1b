"""The saved state of a run: complete, or refused."""

from pathlib import Path

import numpy as np
import pytest

from nanovllm.errors import TrainingError
from nanovllm.training.resume import load_arrays, load_metadata, save_state
from nanovllm.training.run.checkpoint import RESUME_FILE


def test_state_is_restored(tmp_path: Path) -> None:
    flat = np.arange(5, dtype=np.float32)
    save_state(tmp_path, {"parameters": flat}, {"step": 7, "config": {"lr": 0.5}})
    assert load_metadata(tmp_path) == {"step": 7, "config": {"lr": 0.5}}
    into = np.zeros_like(flat)
    load_arrays(tmp_path, {"parameters": into})
    np.testing.assert_array_equal(into, flat)
    with pytest.raises(TrainingError, match=r"parameters is float32 \[5\].* need float32 \[6\]"):
        load_arrays(tmp_path, {"parameters": np.zeros(6, dtype=np.float32)})
    with pytest.raises(TrainingError, match="damaged"):
        load_arrays(tmp_path, {"moments": into})


def test_a_missing_or_damaged_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"has no resume\.safetensors to resume from"):
        load_metadata(tmp_path)
    save_state(tmp_path, {"parameters": np.zeros(400, dtype=np.float32)}, {})
    path = tmp_path / RESUME_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"resume\.safetensors is damaged"):
        load_metadata(tmp_path)
