"""The tiny model and its values are those of the recorded case."""

from pathlib import Path

import numpy as np

from nanovllm.learn.tiny_model import GREEDY, LOGPROBS, PROMPT, TINY_CONFIG, tiny_weights
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.families.registry import load_config
from tests.reference.cases import GREEDY_PROMPT, options_of, prompts_of
from tests.support.checkpoints import write_checkpoint

REFERENCE = Path(__file__).parents[1] / "reference" / "recorded.npz"


def test_the_weights_are_those_of_the_case(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **options_of("untied"))
    config = load_config(tmp_path)
    assert config == TINY_CONFIG
    stored, drawn = load_weights(tmp_path, config), tiny_weights()
    for name in ("token_embedding", "position_embedding", "head"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(drawn, name))
    for one, other in zip(stored.layers, drawn.layers, strict=True):
        np.testing.assert_array_equal(one.down.weight, other.down.weight)


def test_the_values_are_the_recorded_ones() -> None:
    prompts = prompts_of(TINY_CONFIG.vocab)
    start = sum(len(prompt) - 1 for prompt in prompts[:GREEDY_PROMPT])
    assert prompts[GREEDY_PROMPT].tolist() == list(PROMPT)
    with np.load(REFERENCE, allow_pickle=False) as recorded:
        logprobs = recorded["untied/targets"][start : start + len(PROMPT) - 1]
        np.testing.assert_allclose(LOGPROBS, logprobs, atol=6e-5, rtol=0)
        assert recorded["untied/greedy_ids"].tolist() == list(GREEDY)
