"""Names that somebody may have meant."""

import pytest

from nanovllm import SamplingParams, StructuredOutputs
from nanovllm.suggestions import suggest


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("temprature", "temperature"),
        ("maxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("MAX_TOKENS", "max_tokens"),
        ("temp", "temperature"),
        ("max_new_tokens", "max_tokens"),
        ("guided_regex", None),
        ("te", None),
        ("--xyz", None),
    ],
)
def test_a_name_is_found_by_similarity_beginning_or_another_api(
    name: str, found: str | None
) -> None:
    assert suggest(name, ["temperature", "max_tokens", "top_p"]) == found


@pytest.mark.parametrize(
    ("kind", "name", "advice"),
    [
        (SamplingParams, "max_new_tokens", "did you mean 'max_tokens'?"),
        (SamplingParams, "guided_regex", "did you mean 'structured_outputs'?"),
        (SamplingParams, "temprature", "did you mean 'temperature'?"),
        (SamplingParams, "zzz", "it takes n, best_of"),
        (StructuredOutputs, "json_objekt", "did you mean 'json_object'?"),
    ],
)
def test_an_unknown_setting_is_a_type_error_with_advice(
    kind: type[object], name: str, advice: str
) -> None:
    with pytest.raises(
        TypeError, match=f"{kind.__name__}\\(\\) got an unexpected .*{name}"
    ) as caught:
        kind(**{name: 1})
    assert advice in str(caught.value)
    with pytest.raises(TypeError, match="positional"):
        kind(1)  # type: ignore[call-arg]
