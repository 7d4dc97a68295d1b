"""Files of checkpoints."""

from pathlib import Path

import numpy as np
import pytest

from nanovllm.model.checkpoint import expected_shapes, load_arrays
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import load_config
from nanovllm.training.atomic_files import write_json
from nanovllm.training.run import checkpoint


@pytest.mark.parametrize("tied_head", [True, False])
def test_what_is_saved_loads_as_a_checkpoint(tmp_path: Path, tied_head: bool) -> None:
    config = ModelConfig(
        vocab=11, max_positions=8, d_model=12, layers=2, heads=3, d_ff=20, tied_head=tied_head
    )
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }
    settings = checkpoint.hugging_face_config(config, dropout=0.1)
    write_json(tmp_path / "config.json", settings)
    checkpoint.save_weights(tmp_path, arrays)
    assert load_config(tmp_path) == config
    loaded = load_arrays(tmp_path, config)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
