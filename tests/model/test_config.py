"""config.json: the published ones are read, and every unusable value is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import CheckpointError
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import load_config, read_config
from tests.reference.cases import CASES, options_of
from tests.support.checkpoints import tiny_config, tiny_tensors, write_json

PUBLISHED_GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
    "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}  # fmt: skip

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


pytestmark = pytest.mark.usefixtures("checked_by_the_config_alone")


def test_the_published_config() -> None:
    config = read_config(PUBLISHED_GPT2)
    assert config == ModelConfig(
        vocab=50257, max_positions=1024, d_model=768, layers=12, heads=12, d_ff=3072,
        epsilon=1e-5, activation="gelu_new", eos_token_ids=(50256,),
    )  # fmt: skip
    assert (
        config.head_dim,
        config.tied_head,
        config.scale_attn_weights,
        config.scale_attn_by_inverse_layer_idx,
    ) == (64, True, True, False)


@pytest.mark.parametrize(
    ("n_embd", "n_layer", "n_head", "parameters"),
    [
        (768, 12, 12, 124_439_808),
        (1024, 24, 16, 354_823_168),
        (1280, 36, 20, 774_030_080),
        (1600, 48, 25, 1_557_611_200),
        (768, 6, 12, 81_912_576),
    ],
)
def test_the_published_sizes(n_embd: int, n_layer: int, n_head: int, parameters: int) -> None:
    assert (
        read_config(
            {**PUBLISHED_GPT2, "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}
        ).num_parameters
        == parameters
    )


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_the_numbers_in_the_file(name: str) -> None:
    options = options_of(name)
    raw = tiny_config(tie_word_embeddings=options.get("tied", True), **options.get("config", {}))
    tensors = tiny_tensors(raw)
    if raw["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    assert read_config(raw).num_parameters == sum(array.size for array in tensors.values())


@pytest.mark.parametrize(
    ("weights", "by_layer", "expected"),
    [
        (True, False, [0.25, 0.25, 0.25]),
        (False, False, [1, 1, 1]),
        (True, True, [0.25, 0.125, 0.25 / 3]),
        (False, True, [1, 0.5, 1 / 3]),
    ],
)
def test_attention_scale(*, weights: bool, by_layer: bool, expected: list[float]) -> None:
    config = read_config(
        tiny_config(
            n_embd=64,
            n_layer=3,
            scale_attn_weights=weights,
            scale_attn_by_inverse_layer_idx=by_layer,
        )
    )
    assert [config.attention_scale(layer) for layer in range(3)] == pytest.approx(
        expected, rel=1e-15
    )


def test_what_may_be_left_out() -> None:
    optional = [
        "n_inner",
        "activation_function",
        "layer_norm_epsilon",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "eos_token_id",
    ]
    config = read_config(
        {key: value for key, value in tiny_config().items() if key not in optional}
    )
    assert (config.d_ff, config.activation, config.epsilon, config.eos_token_ids) == (
        128,
        "gelu_new",
        1e-5,
        (),
    )
    assert config.attention_scale(1) == pytest.approx(8**-0.5)
    assert read_config(tiny_config(n_positions=..., n_ctx=77)).max_positions == 77
    assert read_config(tiny_config(n_inner=50)).d_ff == 50


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"]}, "GPTNeoForCausalLM"),
        (tiny_config(model_type="gptj"), "gptj"),
        (tiny_config(model_type=...), "nameless"),
        ({}, "nameless"),
    ],
)
def test_another_architecture_is_refused_with_its_name(raw: dict[str, Any], name: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"(?s){name}.*model_type gpt2, llama, mistral, qwen2 or qwen3"
    ):
        read_config(raw)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "\x1b[31m" + "x" * 10**6},
        {"model_type": nested(100_000)},
        {"model_type": "x", "architectures": ["\x1b[31m" * 10**5] * 100},
        {"model_type": "x", "architectures": nested(100_000)},
        tiny_config(activation_function="\x1b" * 10**6),
        tiny_config(layer_norm_epsilon=nested(100_000)),
        tiny_config(n_layer="\u202e" * 10**6),
        tiny_config(add_cross_attention={"\x1b": "\x9b" * 10**6}),
    ],
)
def test_messages_are_short_and_printable(raw: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(raw)
    message = str(caught.value)
    assert message.replace("\n", "").isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("n_head", 5, "5 heads do not divide"),
        ("n_head", 0, "heads is 0 "),
        ("n_embd", -32, "d_model is -32 "),
        ("n_embd", "32", "d_model is '32' "),
        ("n_layer", 2.0, "layers is 2.0 "),
        ("n_layer", None, "layers is None "),
        ("vocab_size", True, "vocab is True "),
        ("vocab_size", 0, "vocab is 0 "),
        ("vocab_size", ..., "lacks vocab_size"),
        ("n_positions", [128], r"max_positions is \[128\] "),
        ("n_inner", 0, "d_ff is 0 "),
        ("n_inner", "128", "d_ff is '128' "),
        ("layer_norm_epsilon", "1e-5", "epsilon is '1e-5' "),
        ("layer_norm_epsilon", 0, "epsilon is 0 "),
        ("layer_norm_epsilon", float("nan"), "epsilon is nan "),
        ("layer_norm_epsilon", float("inf"), "epsilon is inf "),
        ("activation_function", "swiglu", "'swiglu' but must be one of .*gelu_new"),
        ("activation_function", ["gelu_new"], r"\['gelu_new'\] but must be one of"),
        ("activation_function", None, "activation_function is None"),
        ("scale_attn_weights", "false", "scale_attn_weights is 'false' "),
        ("scale_attn_by_inverse_layer_idx", 1, "scale_attn_by_inverse_layer_idx is 1 "),
        ("tie_word_embeddings", "no", "tied_head is 'no' "),
        ("add_cross_attention", True, "cross-attention"),
        ("position_embedding", "rotary", "'rotary' but must be one of learned, sinusoidal"),
        ("position_embedding", ["learned"], r"\['learned'\] but must be one of"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "'gptq'.*before its quant"),
        ("ablated", [["ffn"]], r"ablated is \(\['ffn'\],\) but must be some of"),
        ("pruned_heads", {"0": [1, 2]}, r"pruned_heads is \{'0': \[1, 2\]\}: every layer"),
    ],
)
def test_a_bad_value_is_refused_with_its_name(key: str, value: object, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_config(tiny_config(**{key: value}))


@pytest.mark.parametrize("none", [{"quantization_config": None}, {"pruned_heads": {}}])
def test_fields_that_change_nothing_are_accepted(none: dict[str, Any]) -> None:
    assert read_config(tiny_config(**none)) == read_config(tiny_config())


def test_more_layers_than_any_model_has_are_refused() -> None:
    with pytest.raises(CheckpointError, match="layers is 1000000000 "):
        read_config(tiny_config(n_layer=10**9))


def test_everything_wrong_is_listed_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(
            tiny_config(
                n_layer=0,
                vocab_size="many",
                activation_function="sine",
                layer_norm_epsilon=-1,
                scale_attn_weights=3,
            )
        )
    for part in (
        "layers is 0",
        "vocab is 'many'",
        "'sine'",
        "epsilon is -1",
        "scale_attn_weights is 3",
    ):
        assert part in str(caught.value)


@given(st.dictionaries(st.sampled_from(sorted(tiny_config())), JSON_VALUES))
def test_any_json_is_a_config_or_a_clear_error(changes: dict[str, Any]) -> None:
    try:
        config = read_config({**tiny_config(), **changes})
    except CheckpointError:
        return
    assert config.head_dim * config.heads == config.d_model
    assert config.activation in ACTIVATIONS


def test_load_reads_a_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", tiny_config())
    assert load_config(tmp_path) == read_config(tiny_config())


def test_end_of_text_ids_of_the_generation_config_are_added(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", tiny_config(eos_token_id=[3, 5]))
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [5, 7, 97, -1, "8", True]})
    assert load_config(tmp_path).eos_token_ids == (3, 5, 7)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'{"n_embd": ' + b"9" * 5000 + b"}",
        b'{"a":' * 100_000,
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write_json(tmp_path / "config.json", tiny_config())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_config(tmp_path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path / "nowhere")
    assert "nowhere" in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_config_survives_json() -> None:
    assert read_config(json.loads(json.dumps(PUBLISHED_GPT2))) == read_config(PUBLISHED_GPT2)
