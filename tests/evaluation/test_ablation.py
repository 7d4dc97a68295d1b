"""The losses of `ablate` against a forward pass that leaves out the parts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import TrainingError
from nanovllm.evaluation import ablate, evaluate
from nanovllm.evaluation.scoring import cross_entropy
from nanovllm.model.ablation import Part
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.families.registry import load_config
from nanovllm.model.layers import logits
from tests.support.ablation import forward_without

TEXT = "the cat sat in the hall and the old man saw the cat, é"


def losses_without(folder: Path, *off: Part) -> np.ndarray:
    config = load_config(folder)
    weights = load_weights(folder, config)
    token_ids = Tokenizer.load(folder).encode(TEXT)
    hidden = forward_without(config, weights, token_ids[:-1], off)
    return cross_entropy(logits(weights, hidden), np.array(token_ids[1:], dtype=np.int64))


def test_the_losses_are_those_without_each_part(tiny_model: Path, backend: Any) -> None:
    result = ablate(tiny_model, TEXT, backend=backend)
    whole = losses_without(tiny_model)
    assert result.loss == pytest.approx(whole.mean(), abs=1e-5)
    assert len(result.parts) == 2 * (4 + 3)
    for each in result.parts:
        losses = losses_without(tiny_model, each.part)
        changes = losses - whole
        assert each.loss == pytest.approx(losses.mean(), abs=1e-4), each.part
        assert each.change == pytest.approx(changes.mean(), abs=1e-4)
        error = changes.std() / len(changes) ** 0.5
        assert each.standard_error == pytest.approx(error, abs=1e-4)
        bits = losses.sum() / np.log(2) / result.bytes
        assert each.bits_per_byte == pytest.approx(bits, abs=1e-4)


def test_the_whole_model_has_the_loss_of_evaluate(tiny_model: Path) -> None:
    settings: Any = {"quantization": "int8", "context": 16, "max_tokens": 20}
    result = ablate(tiny_model, TEXT, kinds=["block"], **settings)
    expected = evaluate(tiny_model, TEXT, use_tqdm=False, **settings)
    assert (result.loss, result.bits_per_byte) == (expected.loss, expected.bits_per_byte)
    assert (result.tokens, result.bytes, result.context) == (20, expected.bytes, 16)
    assert [each.part for each in result.parts] == [Part(0, "block"), Part(1, "block")]
    assert all(np.isfinite(each.change) for each in result.parts)


def test_an_error_says_what_is_wrong(tiny_model: Path) -> None:
    kinds: Any = ["heads"]
    with pytest.raises(ValueError, match="'heads' but must be of head, attention, ffn, block"):
        ablate(tiny_model, TEXT, kinds=kinds)
    with pytest.raises(TrainingError, match="at least 2 are needed"):
        ablate(tiny_model, "")
    with pytest.raises(ValueError, match="context is 999, but the model has 128 positions"):
        ablate(tiny_model, TEXT, context=999)
