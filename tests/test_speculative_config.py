"""SpeculativeConfig: what is valid, and what the errors of the other settings say."""

from dataclasses import fields
from typing import Any

import pytest

from nanovllm import EngineConfig, InvalidRequestError, SpeculativeConfig


def test_a_mapping_is_as_good_as_the_class() -> None:
    config = EngineConfig(speculative_config={"method": "ngram", "prompt_lookup_max": 3})
    assert config.speculative_config == SpeculativeConfig(method="ngram", prompt_lookup_max=3)
    assert config.speculation is config.speculative_config
    assert EngineConfig().speculation is None
    assert SpeculativeConfig.of({}) == SpeculativeConfig()


@pytest.mark.parametrize(
    ("settings", "uses_ngrams"),
    [
        ({}, True), ({"method": "ngram"}, True), ({"model": "a"}, False),
        ({"model": "a", "method": "draft_model"}, False), ({"model": "a", "method": "ngram"}, True),
    ],
)  # fmt: skip
def test_a_draft_model_replaces_n_grams_unless_both_are_named(
    settings: dict[str, Any], uses_ngrams: bool
) -> None:
    assert SpeculativeConfig(**settings).uses_ngrams is uses_ngrams


WRONG = [
    ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0 but .* from 1 to 32"),
    ({"num_speculative_tokens": 1000}, "num_speculative_tokens is 1000 but .* from 1 to 32"),
    ({"num_speculative_tokens": True}, "num_speculative_tokens is True but must be an integer"),
    ({"prompt_lookup_min": 5}, r"prompt_lookup_min is 5, more than .*\(4\); lower the first"),
    ({"prompt_lookup_max": 17}, "prompt_lookup_max is 17 but must be an integer, from 1 to 16"),
    ({"method": "eagle"}, "method is 'eagle' but must be 'ngram' or 'draft_model'"),
    ({"method": "draft_model"}, "no model is named; set model"),
    ({"model": "a", "prompt_lookup_max": 3}, 'prompt_lookup_max is 3, .*set method to "ngram"'),
    ({"dtype": "bfloat16"}, "dtype is 'bfloat16', .*leave it out, or set model"),
    ({"draft_tensor_parallel_size": 1}, "has 'draft_tensor_parallel_size': .*in one process"),
    ({"disable_by_batch_size": 4}, "fewer tokens are drafted where they would not pay"),
    ({"num_tokens": 4}, "has 'num_tokens': did you mean 'num_speculative_tokens'"),
    ({"temperature": 4}, "has 'temperature': it takes method, model, num_spec"),
    ({3: 4}, "has 3: it takes method"),
    ("ngram", """is 'ngram' but must be a mapping, such as {"method": "ngram","""),
    (True, "is True but must be a mapping"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_an_error_has_the_value_and_the_remedy(settings: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^speculative_config.*{message}") as caught:
        EngineConfig(speculative_config=settings)
    assert caught.value.param == "speculative_config"


def test_the_class_itself_suggests_fields() -> None:
    with pytest.raises(TypeError, match="did you mean 'num_speculative_tokens'"):
        SpeculativeConfig(num_speculative_token=3)  # type: ignore[call-arg]


def test_every_field_of_vllm_without_a_counterpart_has_advice() -> None:
    """The keys are those of SpeculativeConfig in vLLM 0.11."""
    known = {field.name for field in fields(SpeculativeConfig)}
    for name in (
        "num_speculative_tokens", "model", "method", "draft_tensor_parallel_size", "quantization",
        "max_model_len", "revision", "code_revision", "disable_by_batch_size", "disable_logprobs",
        "disable_padded_drafter_batch", "prompt_lookup_max", "prompt_lookup_min",
        "speculative_token_tree", "enforce_eager", "suffix_decoding_max_tree_depth",
    ):  # fmt: skip
        if name not in known:
            with pytest.raises(InvalidRequestError, match=f"has '{name}': .*(leave it out|set|by)"):
                SpeculativeConfig.of({name: 1})
