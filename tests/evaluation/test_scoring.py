"""Scores of tokens: windows, cross-entropy, and batches of windows against single prefixes."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.evaluation.scoring import cross_entropy, cut_windows, score_windows
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.numpy_backend import NumpyBackend

TEXTS = [np.arange(start, start + length, dtype=np.int64) for start, length in ((0, 50), (7, 2))]


def spans(length: int, context: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Return inputs and targets of the windows of the text 0, 1, 2, ..."""
    text = np.arange(length, dtype=np.int64)
    return [
        (window.inputs.tolist(), window.targets.tolist())
        for window in cut_windows(text, context, stride)
    ]


def test_windows_without_overlap_share_one_token() -> None:
    assert spans(8, 3, 3) == [
        ([0, 1, 2], [1, 2, 3]), ([3, 4, 5], [4, 5, 6]), ([6], [7]),
    ]  # fmt: skip


def test_overlapping_windows_score_what_is_new() -> None:
    assert spans(8, 4, 2) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]), ([2, 3, 4, 5], [5, 6]), ([4, 5, 6], [7]),
    ]  # fmt: skip


@given(length=st.integers(0, 60), context=st.integers(1, 20), data=st.data())
def test_every_token_but_the_first_is_predicted_once(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    windows = spans(length, context, stride)
    assert [target for _, targets in windows for target in targets] == list(range(1, length))
    for number, (inputs, targets) in enumerate(windows):
        assert inputs == list(range(number * stride, targets[-1]))
        assert len(inputs) <= context
        if number:
            assert targets[0] - inputs[0] >= context - stride + 1, "context of the first target"


def test_the_loss_of_uniform_logits_is_the_logarithm_of_the_vocabulary() -> None:
    logits = np.full((2, 50), 3.0, dtype=np.float32)
    losses = cross_entropy(logits, np.array([0, 49], dtype=np.int64))
    np.testing.assert_allclose(losses, math.log(50), rtol=1e-12)


def test_losses_that_are_not_finite_stay_in_their_row() -> None:
    logits = np.zeros((3, 4), dtype=np.float32)
    logits[1, 2] = np.nan
    logits[2, 0] = -np.inf
    losses = cross_entropy(logits, np.array([0, 0, 0], dtype=np.int64))
    assert losses[0] == pytest.approx(math.log(4))
    assert np.isnan(losses[1])
    assert np.isposinf(losses[2])


@pytest.mark.parametrize(("context", "stride"), [(128, 128), (20, 20), (20, 7)])
def test_scores_are_those_of_each_prefix_alone(tiny_model: Path, context: int, stride: int) -> None:
    backend = NumpyBackend.load(tiny_model)
    windows = [window for text in TEXTS for window in cut_windows(text, context, stride)]
    steps: list[int] = []
    scores = score_windows(backend, windows, steps.append)
    assert sum(steps) == len(scores.losses) == 50
    backend.allocate_cache(1, 128)
    losses, tokens = [], []
    for window in windows:
        before = len(window.inputs) - len(window.targets)
        for seen, target in enumerate(window.targets.tolist(), start=before + 1):
            prefix = ForwardBatch.single(window.inputs[:seen])
            logits = backend.logits(backend.forward(prefix))[0].astype(np.float64)
            losses.append(float(np.log(np.exp(logits).sum()) - logits[target]))
            tokens.append(int(logits.argmax()))
    np.testing.assert_allclose(scores.losses, losses, rtol=0, atol=1e-5)
    assert scores.argmax_tokens.tolist() == tokens


def test_no_windows_have_no_scores(tiny_model: Path) -> None:
    scores = score_windows(NumpyBackend.load(tiny_model), [])
    assert scores.losses.shape == scores.argmax_tokens.shape == (0,)
