"""Files of checkpoints: complete or as they were before."""

from pathlib import Path

import numpy as np
import pytest

from nanovllm.errors import TrainingError
from nanovllm.model.checkpoint import expected_shapes, load_arrays
from nanovllm.model.config import GPT2Config
from nanovllm.training.atomic_files import write_json
from nanovllm.training.run import checkpoint

CONFIG = GPT2Config(
    vocab=11, max_positions=8, d_model=12, layers=2, heads=3, d_ff=20, eos_token_ids=(4,)
)


@pytest.mark.parametrize("tied_head", [True, False])
def test_what_is_saved_loads_as_a_checkpoint(tmp_path: Path, tied_head: bool) -> None:
    config = GPT2Config(
        vocab=11, max_positions=8, d_model=12, layers=2, heads=3, d_ff=20, tied_head=tied_head
    )
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }
    settings = checkpoint.hugging_face_config(config, dropout=0.1)
    write_json(tmp_path / "config.json", settings)
    checkpoint.save_weights(tmp_path, config, arrays)
    assert GPT2Config.load(tmp_path) == config
    loaded = load_arrays(tmp_path, config)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_state_is_restored(tmp_path: Path) -> None:
    flat = np.arange(5, dtype=np.float32)
    checkpoint.save_state(tmp_path, {"parameters": flat}, {"step": 7, "config": {"lr": 0.5}})
    assert checkpoint.load_counters(tmp_path) == {"step": 7, "config": {"lr": 0.5}}
    into = np.zeros_like(flat)
    checkpoint.load_state(tmp_path, {"parameters": into})
    np.testing.assert_array_equal(into, flat)
    with pytest.raises(TrainingError, match=r"parameters is float32 \[5\].* need float32 \[6\]"):
        checkpoint.load_state(tmp_path, {"parameters": np.zeros(6, dtype=np.float32)})
    with pytest.raises(TrainingError, match="damaged"):
        checkpoint.load_state(tmp_path, {"moments": into})


def test_a_missing_or_damaged_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"has no resume\.safetensors to resume from"):
        checkpoint.load_counters(tmp_path)
    checkpoint.save_state(tmp_path, {"parameters": np.zeros(400, dtype=np.float32)}, {})
    path = tmp_path / checkpoint.RESUME_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"resume\.safetensors is damaged"):
        checkpoint.load_counters(tmp_path)
