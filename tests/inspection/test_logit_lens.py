"""The logit lens against the definition, computed token by token."""

import numpy as np
import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection.logit_lens import MAX_TOP, logit_lens
from nanovllm.inspection.observe import InspectedModel
from nanovllm.model.layers import layer_norm, logits
from nanovllm.model.observer import ignore

TOKENS = list(range(70, 140))  # more than are computed at a time


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: np.ndarray = exponentials / exponentials.sum()
    return probabilities


def test_the_last_row_is_the_prediction_of_the_model(model: InspectedModel) -> None:
    lens = logit_lens(model, TOKENS, top=3)
    assert lens["layers"] == ["embeddings", "after layer 0", "after layer 1 (output)"]
    scores = logits(model.weights, model.forward(TOKENS, ignore))
    for position, prediction in enumerate(lens["cells"][-1]):
        p = softmax(scores[position])
        best = np.argsort(-p)[:3]
        assert [token["id"] for token in prediction["top"]] == best.tolist()
        values = [token["p"] for token in prediction["top"]]
        np.testing.assert_allclose(values, p[best], atol=1e-6)
        assert prediction["entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
        if position + 1 < len(TOKENS):
            target = TOKENS[position + 1]
            assert prediction["p_of_next"] == pytest.approx(p[target], rel=1e-5, abs=1e-7)
            assert prediction["rank_of_next"] == 1 + (p > p[target]).sum()
        else:
            assert (prediction["p_of_next"], prediction["rank_of_next"]) == (None, None)


def test_the_first_row_reads_the_embeddings(model: InspectedModel) -> None:
    weights = model.weights
    hidden = weights.token_embedding[TOKENS] + weights.position_embedding[: len(TOKENS)]
    normed = layer_norm(hidden, weights.final_norm, model.config.epsilon)
    expected = logits(weights, normed).argmax(axis=1)
    row = logit_lens(model, TOKENS, top=1)["cells"][0]
    assert [prediction["top"][0]["id"] for prediction in row] == expected.tolist()


def test_the_number_of_tokens_is_limited(model: InspectedModel) -> None:
    for top in (0, MAX_TOP + 1):
        with pytest.raises(InvalidRequestError, match=f"top is {top} but must be 1 to {MAX_TOP}"):
            logit_lens(model, [1], top)
