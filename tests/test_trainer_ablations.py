"""Runs of networks without a part: resumed to the same bits, and served only as what they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import CheckpointError, TrainingError
from nanovllm.llm import LLM
from nanovllm.model.config import ABLATIONS
from nanovllm.model.families.registry import load_config
from nanovllm.sampling_params import SamplingParams
from nanovllm.trainer import Trainer
from nanovllm.training.config import TrainingConfig
from nanovllm.training.report import read_run
from nanovllm.training.report.content import describe_run
from tests.support.training_runs import assert_same_weights

SETTINGS: dict[str, Any] = {
    "layers": 1,
    "heads": 2,
    "width": 16,
    "context": 8,
    "tokenizer": "char",
    "lr": 1e-2,
    "steps": 4,
    "sample_tokens": 6,
    "eval_every": 50,
    "backend": "numpy",
}


def train(folder: Path, **changes: Any) -> Path:
    """Train a new run, or continue that in `folder`."""
    text = folder.parent / "text.txt"
    text.write_text("she sells sea shells on the sea shore. " * 20, encoding="utf-8")
    if folder.exists():
        Trainer.resume(folder, **changes).train()
    else:
        Trainer(TrainingConfig(data=text, output=folder, **SETTINGS | changes)).train()
    return folder


@pytest.mark.parametrize("part", ABLATIONS)
def test_a_run_without_a_part(tmp_path: Path, part: str) -> None:
    whole, parts = train(tmp_path / "whole", ablate=part), tmp_path / "parts"
    train(train(parts, ablate=[part], stop_after=2))
    assert_same_weights(whole, parts)
    raw = json.loads((whole / "config.json").read_text())
    assert raw["ablated"] == [part]
    sample = json.loads((whole / "samples.jsonl").read_text().splitlines()[-1])
    assert len(sample["text"]) == len(sample["prompt"]) + 1  # the context ends
    commands = describe_run(read_run(whole), "run")["commands"]
    if part in ("positions", "ffn", "scaling"):
        assert raw["model_type"] == "gpt2"
        assert len(commands) == 2
        served_and_trained_agree(whole)
        return
    assert not commands
    assert raw["model_type"] == "ablated-gpt2"
    for load in (LLM, load_config):
        with pytest.raises(CheckpointError, match=rf"trained without its {part} \(nanovllm train"):
            load(whole)
    with pytest.raises(CheckpointError, match=f"trained without its {part}"):
        Trainer(TrainingConfig(data=tmp_path / "text.txt", output=tmp_path / "2", init_from=whole))


def served_and_trained_agree(folder: Path) -> None:
    """The server computes the network without its part, and fine-tuning keeps it absent."""
    prompt = [1, 2, 3, 4, 5]
    with LLM(str(folder)) as llm:
        score = SamplingParams(max_tokens=0, prompt_logprobs=0)
        scored = llm.generate([prompt], score, use_tqdm=False)[0].prompt_logprobs
    assert scored is not None
    logprobs = [one[token].logprob for one, token in zip(scored, prompt, strict=True) if one]
    config = TrainingConfig(
        data=folder.parent / "text.txt",
        output=folder.parent / "tuned",
        init_from=folder,
        steps=2,
        backend="numpy",
    )
    with Trainer(config) as trainer:
        assert trainer.setup.model.ablated
        assert trainer.model.loss([prompt]) == pytest.approx(-sum(logprobs) / 4, abs=1e-5)
        absent = [
            array for array in trainer.model.weights.values() if not array.any() and array.ndim == 2
        ]
        trainer.train()
        assert not any(array.any() for array in absent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ablate": "norm"}, r"ablate has 'norm' but must be some of positions, layer-norm"),
        ({"ablate": 3}, "ablate is 3 but must be names"),
        ({"ablate": ["ffn"], "init_from": "gpt2"}, "ablate is given, but the network of init_from"),
        ({"ablate": ["causal-mask"], "backend": "numba"}, "causal-mask needs --backend numpy"),
        ({"ablate": ["positions"], "positions": "sinusoidal"}, "positions is sinusoidal, but"),
    ],
)
def test_ablations_that_cannot_be_made_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainingConfig(data="text.txt", output="run", **changes)
