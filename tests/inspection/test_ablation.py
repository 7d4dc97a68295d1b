"""The loss of a prompt without parts, against a forward pass that leaves them out."""

import re

import numpy as np
import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection import ablation
from nanovllm.inspection.ablation import (
    check_work,
    losses_without_each,
    predict_without,
    read_part,
)
from nanovllm.inspection.observe import InspectedModel
from nanovllm.model.ablation import Part, parts_of
from nanovllm.model.config import ModelConfig
from nanovllm.model.layers import logits
from tests.support.ablation import forward_without

TOKENS = list(range(60, 160))  # more than are computed at a time


def probabilities_without(model: InspectedModel, *off: Part) -> np.ndarray:
    hidden = forward_without(model.config, model.weights, TOKENS, off)
    scores = logits(model.weights, hidden).astype(np.float64)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: np.ndarray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def loss_of(probabilities: np.ndarray) -> float:
    return float(-np.log(probabilities[np.arange(len(TOKENS) - 1), TOKENS[1:]]).mean())


def test_the_losses_are_those_without_each_part(model: InspectedModel) -> None:
    whole, losses = losses_without_each(model, TOKENS)
    assert whole == pytest.approx(loss_of(probabilities_without(model)), abs=1e-5)
    assert list(losses) == sorted(parts_of(model.config), key=lambda part: part.layer)
    for part, loss in losses.items():
        expected = loss_of(probabilities_without(model, part))
        assert loss == pytest.approx(expected, abs=1e-5), part


def test_the_predictions_are_those_without_the_parts(model: InspectedModel) -> None:
    off = [Part(0, "head", 0), Part(0, "head", 3), Part(1, "ffn")]
    result = predict_without(model, TOKENS, off, top=2)
    expected = probabilities_without(model, *off)
    assert result["loss"] == pytest.approx(loss_of(expected), abs=1e-5)
    for cell, p in zip(result["cells"], expected, strict=True):
        assert [token["id"] for token in cell["top"]] == np.argsort(-p)[:2].tolist()
        assert cell["top"][0]["p"] == pytest.approx(p.max(), abs=1e-6)


def test_a_prompt_of_one_token_has_no_loss(model: InspectedModel) -> None:
    assert predict_without(model, [70], [])["loss"] is None
    whole, losses = losses_without_each(model, [70])
    assert whole is None
    assert set(losses.values()) == {None}


def test_a_prompt_that_takes_too_long_is_refused_before(
    model: InspectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "MAX_MULTIPLICATIONS", 30_000_000)
    monkeypatch.setattr(ablation, "streams_without_each", None)  # nothing is computed
    message = r"the prompt has 100 tokens; to measure each of the 14 parts .* up to (\d+): shorten"
    with pytest.raises(InvalidRequestError, match=message) as raised:
        losses_without_each(model, TOKENS)
    assert raised.value.param == "prompt"
    matched = re.search(message, str(raised.value))
    assert matched is not None
    limit = int(matched[1])
    check_work(model.config, limit)
    with pytest.raises(InvalidRequestError):
        check_work(model.config, limit + 1)


def test_the_limit_is_below_the_processor_time_of_a_request() -> None:
    small = ModelConfig(
        vocab=50257, max_positions=1024, d_model=768, layers=12, heads=12, d_ff=3072
    )
    check_work(small, 150)  # GPT-2 small needs 0.52 s a token
    with pytest.raises(InvalidRequestError, match="180 parts of this model"):
        check_work(small, 225)


def test_a_part_that_the_model_does_not_have_is_refused(model: InspectedModel) -> None:
    assert read_part(model.config, 0, 1, "head", 3) == Part(1, "head", 3)
    for layer, kind, head, message in (
        (2, "block", None, r"off\.5\.layer is 2, but the model has the layers 0 to 1"),
        (0, "head", 4, r"off\.5\.head is 4, but the model has the heads 0 to 3"),
        (0, "block", 1, r"off\.5 has the kind 'block' with a head; give a head for the kind"),
    ):
        with pytest.raises(InvalidRequestError, match=message) as raised:
            read_part(model.config, 5, layer, kind, head)
        assert raised.value.param == "off"
