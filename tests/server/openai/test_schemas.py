"""The settings of SamplingParams are fields of bodies, with the bounds that they have there."""

from typing import Any

import pytest

from nanovllm.checked_fields import CheckedField, checked_fields
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.openai.chat_schemas import ChatRequest
from nanovllm.server.openai.completions import sampling_fields
from nanovllm.server.openai.schemas import CompletionRequest

SETTINGS = checked_fields(SamplingParams)
OTHER_BOUNDS = ("max_tokens", "logprobs")  # in one of the bodies


def value_of(setting: CheckedField) -> Any:
    """Return a valid value that is not the default."""
    if setting.kind is bool:
        return not setting.default
    return setting.choices[-1] if setting.choices else setting.bounds.le


@pytest.mark.parametrize("body", [CompletionRequest, ChatRequest])
def test_every_setting_is_a_field_with_its_bounds(
    body: type[CompletionRequest | ChatRequest],
) -> None:
    assert SETTINGS.keys() <= body.model_fields.keys()
    properties = body.model_json_schema()["properties"]
    for name, setting in SETTINGS.items():
        if setting.kind not in (int, float) or name in OTHER_BOUNDS:
            continue
        options = properties[name].get("anyOf", [properties[name]])
        (described,) = [option for option in options if option["type"] != "null"]
        bounds = described.get("minimum"), described.get("exclusiveMinimum"), described["maximum"]
        assert bounds == (setting.bounds.ge, setting.bounds.gt, setting.bounds.le), name


def test_every_setting_that_is_one_value_reaches_the_engine() -> None:
    """A setting that SamplingParams declares needs no other declaration to be served."""
    for name, setting in SETTINGS.items():
        if name not in OTHER_BOUNDS and (setting.kind is not None or setting.choices):
            sent = {"prompt": "a", name: value_of(setting)}
            assert sampling_fields(CompletionRequest.model_validate(sent))[name] == sent[name]
