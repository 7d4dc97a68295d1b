"""The config.json of Llama and its relatives: what is read, and what is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import CheckpointError
from nanovllm.model.families.registry import read_config, short_name
from nanovllm.model.rotary import Rotary
from tests.model.test_config import JSON_VALUES
from tests.reference.cases import FAMILY_CASES, options_of
from tests.support.checkpoints import load, tiny_config, tiny_tensors, write_checkpoint
from tests.support.families import CONFIGS

pytestmark = pytest.mark.usefixtures("checked_by_the_config_alone")

SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.04, "intermediate_size": 1536, "max_position_embeddings": 8192,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
LLAMA_32_1B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "eos_token_id": [128001, 128008, 128009], "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA3 = LLAMA_32_1B["rope_scaling"]
QWEN3_06B: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "max_position_embeddings": 40960, "max_window_layers": 28, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "attention_bias": False,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    "eos_token_id": 151645,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [(SMOLLM2_135M, 134_515_008), (LLAMA_32_1B, 1_235_814_400), (QWEN3_06B, 596_049_920)],
    ids=["SmolLM2-135M", "Llama-3.2-1B", "Qwen3-0.6B"],
)
def test_the_published_sizes(raw: dict[str, Any], parameters: int) -> None:
    assert read_config(raw).num_parameters == parameters


def test_what_is_read() -> None:
    config = read_config(LLAMA_32_1B)
    assert (config.kv_heads, config.head_dim, config.norm, config.is_gated) == (8, 64, "rms", True)
    assert (config.queries_width, config.keys_width, config.qkv_width) == (2048, 512, 3072)
    assert config.rotary == Rotary(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert read_config(QWEN3_06B).has_query_norm
    assert read_config(QWEN3_06B).queries_width == 2 * read_config(QWEN3_06B).d_model
    assert not config.biased
    assert read_config({**LLAMA_32_1B, "pretraining_tp": 2}) == config, "it is about rounding alone"
    raw = tiny_config(model_type="mistral", sliding_window=...)
    assert read_config(raw).window == 4096
    assert read_config({**raw, "sliding_window": None}).window is None


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_parameters_are_the_numbers_in_the_file(name: str) -> None:
    raw = tiny_config(tie_word_embeddings=False, **options_of(name)["config"])
    tensors = tiny_tensors(raw)
    assert read_config(raw).num_parameters == sum(array.size for array in tensors.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_key_value_heads": 3}, "heads is 4, which 3 heads of keys and values"),
        ({"num_key_value_heads": 0}, "kv_heads is -1 "),
        ({"num_key_value_heads": 2.0}, "kv_heads is 2.0 "),
        ({"head_dim": 7}, "head_dim is 7, but rotary positions turn pairs"),
        ({"head_dim": 0}, "head_dim is -1 "),
        ({"head_dim": 10**6}, "head_dim is 1000000 "),
        ({"hidden_size": "64"}, "d_model is '64' "),
        ({"intermediate_size": None}, "d_ff is None "),
        ({"hidden_act": "relu"}, "the gate is relu but must be one of silu"),
        ({"rms_norm_eps": -1}, "epsilon is -1 "),
        ({"rope_theta": 0}, "rope_theta of the rotary positions is 0 "),
        ({"rope_theta": "many"}, "rope_theta of the rotary positions is 'many' "),
        ({"rope_theta": 10**39}, "rope_theta of the rotary positions is 1000"),
        ({"rms_norm_eps": 1e-300}, "epsilon is 1e-300 "),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\] but must be an object"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type is 'dynamic' but must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "factor of the rotary positions is None "),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "high_freq_factor of the rotary positions is None ",
        ),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor must be below"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"vocab_size": ...}, "lacks vocab_size"),
        ({"model_type": "qwen2", "num_key_value_heads": ...}, "lacks num_key_value_heads"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0 but"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_with_its_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_config(tiny_config(**{"model_type": "llama", **changes}))


@given(
    st.sampled_from(sorted(CONFIGS)),
    st.dictionaries(
        st.sampled_from([*sorted(tiny_config(model_type="qwen3")), "rope_scaling", "mlp_bias"]),
        JSON_VALUES,
    ),
)
def test_any_json_is_a_config_or_a_clear_error(model_type: str, changes: dict[str, Any]) -> None:
    try:
        config = read_config({**tiny_config(model_type=model_type), **changes})
    except CheckpointError:
        return
    assert config.heads % config.kv_heads == 0
    assert config.head_dim % 2 == 0


def test_names_of_tensors() -> None:
    assert short_name("model.layers.3.mlp.up_proj.weight") == "layers.3.mlp.up_proj.weight"
    assert short_name("transformer.h.0.ln_1.bias") == "h.0.ln_1.bias"
    assert short_name("model.layers.3.self_attn.rotary_emb.inv_freq") is None
    assert short_name("h.11.attn.bias") is None


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "qwen3"])
def test_each_tensor_is_in_its_place(tmp_path: Path, name: str) -> None:
    """A block's columns are those of the file's tensors, transposed and side by side."""
    folder = write_checkpoint(tmp_path, **options_of(name))
    raw = tiny_config(**options_of(name)["config"], tie_word_embeddings=name == "qwen2")
    tensors = tiny_tensors(raw, seed=options_of(name)["seed"])
    block = load(folder).layers[1]
    for linear, names in (
        (block.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (block.out, ("self_attn.o_proj",)),
        (block.up, ("mlp.gate_proj", "mlp.up_proj")),
        (block.down, ("mlp.down_proj",)),
    ):
        weights = [tensors[f"layers.1.{part}.weight"] for part in names]
        np.testing.assert_array_equal(linear.weight, np.concatenate(weights).T)
        biases = [tensors.get(f"layers.1.{part}.bias", np.zeros(0)) for part in names]
        given = np.concatenate(biases)
        np.testing.assert_array_equal(linear.bias, given if given.size else 0)
    assert (block.query_gain is not None) == (name == "qwen3")
