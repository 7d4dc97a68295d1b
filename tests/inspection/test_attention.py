"""Attention weights: their sums, transformers' weights, and the statistics of heads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.hub.names import bundled_folder
from nanovllm.inspection import attention
from nanovllm.inspection.attention import (
    HeadStatistics,
    attention_head,
    attention_weights,
    describe_heads,
    head_statistics,
)
from nanovllm.inspection.observe import InspectedModel
from tests.reference.cases import ATTENTION_CASES, attention_prompt, options_of
from tests.reference.record_attention import reference_attention
from tests.support.checkpoints import write_checkpoint, write_tokenizer

RECORDED = Path(__file__).parents[1] / "reference" / "recorded_attention.npz"


def unpack(packed: np.ndarray, tokens: int) -> np.ndarray:
    """Return weights [..., queries, keys] with zeros above the diagonal."""
    weights = np.zeros((*packed.shape[:-1], tokens, tokens), dtype=np.float32)
    queries, keys = np.tril_indices(tokens)
    weights[..., queries, keys] = packed
    return weights


def test_every_row_sums_to_one(model: InspectedModel) -> None:
    weights = attention_weights(model, range(40))
    assert weights.shape == (2, 4, 40 * 41 // 2)
    assert weights.min() >= 0
    np.testing.assert_allclose(unpack(weights, 40).sum(axis=3), 1, atol=1e-6)
    np.testing.assert_array_equal(attention_weights(model, range(40), layer=1)[0], weights[1])


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_weights_equal_the_recorded_ones_of_transformers(case: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **options_of(case))
    write_tokenizer(tmp_path)
    prompt = attention_prompt()
    weights = attention_weights(InspectedModel.load(tmp_path), prompt.tolist())
    with np.load(RECORDED, allow_pickle=False) as recorded:
        np.testing.assert_allclose(unpack(weights, len(prompt)), recorded[case], atol=1e-5, rtol=0)


def test_weights_of_the_bundled_model_equal_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = InspectedModel.load(bundled_folder())
    token_ids = model.encode("It was the best of times, it was the worst of times.")
    expected = reference_attention(bundled_folder(), np.array(token_ids, dtype=np.int64))
    weights = unpack(attention_weights(model, token_ids), len(token_ids))
    np.testing.assert_allclose(weights, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", [0, 3, 11])
def test_a_head_is_computed_from_its_query_keys_and_values(
    model: InspectedModel, position: int
) -> None:
    """By the formula, in float64; the weights are those of `attention_weights`."""
    token_ids = list(range(12))
    for layer, head in ((0, 0), (1, 3)):
        found = attention_head(model, token_ids, layer, head, position)
        assert found.keys.shape == found.values.shape == (position + 1, model.config.head_dim)
        scores = found.scale * found.keys.astype(np.float64) @ found.query
        np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-6)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        np.testing.assert_allclose(found.weights, weights, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.output, weights @ found.values, rtol=1e-5, atol=1e-6)
        all_weights = unpack(attention_weights(model, token_ids, layer), len(token_ids))
        row = all_weights[0, head, position, : position + 1]
        np.testing.assert_array_equal(found.weights, row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0, 0), "layer is 2, but the model has the layers 0 to 1"),
        ((0, 4, 0), "head is 4, but the model has the heads 0 to 3"),
        ((0, 0, 3), "query is 3, but the prompt has the positions 0 to 2"),
    ],
)
def test_a_head_that_does_not_exist_is_refused(
    model: InspectedModel, arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as raised:
        attention_head(model, [1, 2, 3], *arguments)
    assert raised.value.param == message.split(maxsplit=1)[0]


def test_an_unknown_layer_is_refused(model: InspectedModel) -> None:
    for layer in (-1, 2):
        with pytest.raises(
            InvalidRequestError, match=f"layer is {layer}, .* layers 0 to 1"
        ) as raised:
            attention_weights(model, [1], layer)
        assert raised.value.param == "layer"


def test_too_many_weights_are_refused(
    model: InspectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MAX_WEIGHTS_BYTES", 4 * 4 * 55)
    attention_weights(model, range(10), layer=0)
    with pytest.raises(InvalidRequestError, match=r"2 layers and 10 tokens are 1760 .* one layer"):
        attention_weights(model, range(10))
    with pytest.raises(InvalidRequestError, match=r"1 layers and 11 tokens .*shorten the prompt"):
        attention_weights(model, range(11), layer=0)


def one_head(rows: list[list[float]], token_ids: list[int]) -> HeadStatistics:
    weights = np.zeros((1, len(rows), len(rows)), dtype=np.float32)
    for query, row in enumerate(rows):
        weights[0, query, : len(row)] = row
    (head,) = describe_heads(3, weights, token_ids)
    return head


def test_statistics_of_a_head_that_reads_the_previous_token() -> None:
    head = one_head([[1], [1, 0], [0, 1, 0], [0, 0, 1, 0]], [5, 6, 7, 8])
    assert (head.layer, head.head) == (3, 0)
    assert (head.entropy, head.previous_token, head.self, head.distance) == (0.0, 1.0, 0.0, 1.0)
    assert head.first_token == 0.0  # without query 1, whose previous token is the first
    assert head.induction is None  # no token occurs twice


def test_statistics_of_a_head_with_equal_weights() -> None:
    head = one_head([[1], [1 / 2] * 2, [1 / 3] * 3, [1 / 4] * 4], [5, 6, 7, 8])
    mean = (1 / 3 + 1 / 4) / 2
    assert head.entropy == pytest.approx(np.log([2, 3, 4]).mean())
    assert [head.previous_token, head.first_token, head.self] == pytest.approx([mean] * 3)
    assert head.distance == pytest.approx((0.5 + 1 + 1.5) / 3)


def test_induction_is_the_weight_on_tokens_after_earlier_occurrences() -> None:
    # Query 2 is 5 again: after the earlier 5 stands key 1. Query 3 is 6: after it stands key 2.
    head = one_head([[1], [1, 0], [0.1, 0.7, 0.2], [0, 0.2, 0.5, 0.3]], [5, 6, 5, 6])
    assert head.induction == pytest.approx((0.7 + 0.5) / 2)
    # A token that follows itself is its own successor, which does not count.
    assert one_head([[1], [0, 1]], [5, 5]).induction is None


def test_three_tokens_are_too_few_for_the_kinds_of_head() -> None:
    head = one_head([[1], [1, 0], [0, 1, 0]], [5, 6, 7])
    assert [head.previous_token, head.first_token, head.self] == [None] * 3
    assert head.distance == 1.0


def test_a_single_token_has_no_statistics(model: InspectedModel) -> None:
    heads = head_statistics(model, [3])
    assert len(heads) == 8
    nothing = HeadStatistics(0, 0, None, None, None, None, None, None)
    assert all(replace(head, layer=0, head=0) == nothing for head in heads)
