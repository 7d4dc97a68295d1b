"""Prompts that are observed, and the limits of their size."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nanovllm.errors import EngineFaultError, InvalidRequestError
from nanovllm.inspection.observe import MAX_PROMPT_CHARACTERS, InspectedModel
from nanovllm.model.observer import ignore


def test_a_text_is_encoded_without_special_tokens(model: InspectedModel) -> None:
    token_ids = model.encode("the end<|endoftext|>")
    assert model.tokenizer.decode(token_ids) == "the end<|endoftext|>"
    assert model.config.vocab - 1 not in token_ids
    assert model.encode(token_ids) == token_ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([0] * 129, "the prompt has 129 tokens, the limit is 128; shorten it"),
        ("x" * (MAX_PROMPT_CHARACTERS + 1), f"the limit is {MAX_PROMPT_CHARACTERS}; shorten it"),
        ([3, 267], "the token id 267 is not in the vocabulary; give 0 to 266"),
        ([-1], "the token id -1 is not in the vocabulary"),
    ],
)
def test_an_invalid_prompt_is_refused(model: InspectedModel, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as raised:
        model.encode(prompt)
    assert raised.value.param == "prompt"


def test_a_checkpoint_that_computes_no_numbers_is_an_error(model: InspectedModel) -> None:
    broken = np.full_like(model.weights.token_embedding, np.nan)
    damaged = replace(model, weights=replace(model.weights, token_embedding=broken))
    with pytest.raises(EngineFaultError, match="not a number"):
        damaged.forward([1, 2], ignore)
