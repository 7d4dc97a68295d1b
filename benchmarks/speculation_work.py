"""What the benchmark of speculative decoding runs: its models, and the prompts of its workloads.

prose    a held-out story goes on
repeats  a passage and its first words, for a model that copies; or prompts of a file
json     a list of objects with fixed keys
random   random tokens, for random weights: the cost where no guess is good
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.contenders import ROOT
from benchmarks.make_model import make_model
from benchmarks.options import tell
from benchmarks.widen import widen
from nanovllm.cli.bench.offline import read_dataset
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.hub import resolve_model
from nanovllm.model.families.registry import load_config
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputs

WORKLOADS = ("prose", "repeats", "json", "random")
PAIRS = ("trained", "repeats", "random")
TEXT = ROOT / "tests" / "data" / "held_out" / "peter-rabbit.txt"
SCHEMA: Mapping[str, Any] = {
    "type": "array", "minItems": 3, "maxItems": 3,
    "items": {
        "type": "object",
        "properties": {
            "character_name": {"type": "string", "maxLength": 12},
            "kind_of_animal": {"enum": ["rabbit", "mouse", "cat", "fox", "none"]},
            "age_in_years": {"type": "integer", "minimum": 0, "maximum": 99},
            "lives_in_a_house": {"type": "boolean"},
        },
        "required": ["character_name", "kind_of_animal", "age_in_years", "lives_in_a_house"],
    },
}  # fmt: skip
_NUM_PROMPTS = 32
_GAIN_SPREAD = 5.0  # sharp predictions: two models would draw equal tokens from even ones
_PROMPT_TOKENS, _PASSAGE_TOKENS, _FIRST_TOKENS = 64, 120, 8
_NEW_TOKENS = {"prose": 160, "repeats": 112, "json": 240, "random": 160}

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Pair:
    """The folders of a model and of its draft model."""

    target: Path
    draft: Path

    def record(self) -> dict[str, Any]:
        """Return names and numbers of parameters as JSON."""
        return {
            name: {"name": folder.name, "parameters": load_config(folder).num_parameters}
            for name, folder in (("target", self.target), ("draft", self.draft))
        }


def pair_of(workload: str) -> str:
    """Return the name of the models that a workload runs on, one of PAIRS."""
    return workload if workload in PAIRS else "trained"


def make_pairs(sources: Mapping[str, str | Path], factors: tuple[int, int], draft: str | Path,
               folder: Path, *, seed: int) -> dict[str, Pair]:  # fmt: skip
    """Make the models that `folder` lacks, and return the pairs by their names.

    Args:
        sources: {name of a pair: the model to widen}, with "random" for weights that are drawn.
        factors: of the model, and of the draft model.
        draft: the draft model to widen.
        folder: for the wide models.
        seed: draws the random weights.
    """
    wide_draft = _ensure_wide(draft, factors[1], folder)
    pairs = {}
    for name, source in sources.items():
        pair = Pair(_ensure_wide(source, factors[0], folder), wide_draft)
        if name == "random":
            target, other = (
                _ensure_random(each, seed + number)
                for number, each in enumerate((pair.target, pair.draft))
            )
            pair = Pair(target, other)
        pairs[name] = pair
    return pairs


def _ensure_wide(model: str | Path, factor: int, folder: Path) -> Path:
    """Return the wide model, made if missing; its name changes with the weights."""
    source, digest = resolve_model(model), hashlib.sha256()
    for file in sorted(source.glob("*.safetensors")):
        digest.update(file.read_bytes())
    output = folder / f"{source.name}-x{factor}-{digest.hexdigest()[:8]}"
    if not output.exists():
        tell(f"Making {output}")
        widen(model, factor, output)
    return output


def _ensure_random(like: Path, seed: int) -> Path:
    """Return a model of the same shape with random weights, made if missing.

    The gains of the last layer norm are random, too. With equal ones, the tied head would predict
    each token to follow itself, which n-grams guess.
    """
    output = like.with_name(f"{like.name}-random-{seed}")
    if not (output / "config.json").is_file():
        tell(f"Making {output}")
        config = load_config(like)
        make_model(
            output, seed=seed, n_embd=config.d_model, n_layer=config.layers, n_head=config.heads,
            vocab_size=config.vocab, n_positions=config.max_positions,
        )  # fmt: skip
        tensors = load_file(output / "model.safetensors")
        gains = np.random.default_rng(seed).normal(0, _GAIN_SPREAD, config.d_model)
        tensors["transformer.ln_f.weight"] = gains.astype(np.float32)
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def make_prompts(
    workload: str, tokenizer: Tokenizer, *, seed: int, scale: int, file: Path | None = None
) -> Prompts:
    """Return the prompts of a workload; those of repeats may come from a JSON Lines file."""
    if workload == "repeats" and file is not None:
        return _read_prompts(file, tokenizer)
    if workload == "random":
        shape = _NUM_PROMPTS, max(2, _PROMPT_TOKENS // scale)
        drawn: Prompts = np.random.default_rng(seed).integers(tokenizer.vocab, size=shape).tolist()
        return drawn
    story = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    count = _PASSAGE_TOKENS if workload == "repeats" else _PROMPT_TOKENS
    count = max(_FIRST_TOKENS + 1, count // scale)
    starts = [index * (len(story) - count) // _NUM_PROMPTS for index in range(_NUM_PROMPTS)]
    windows = [story[start : start + count] for start in starts]
    end: Callable[[list[int]], list[int]] = {
        "prose": lambda _: [],
        "repeats": lambda window: tokenizer.encode("\n\n") + window[:_FIRST_TOKENS],
        "json": lambda _: tokenizer.encode("\n\n"),
    }[workload]
    return [window + end(window) for window in windows]


def choose_prompts(prompts: Prompts, streams: int, number: int) -> Prompts:
    """Return the prompts of a round, whose number counts from 0."""
    first = number * streams
    return [prompts[(first + index) % len(prompts)] for index in range(streams)]


def _read_prompts(file: Path, tokenizer: Tokenizer) -> Prompts:
    """Read the prompts of a JSON Lines file; raise ValueError for one that is no text."""
    prompts = []
    for job in read_dataset(file, None, 1):
        if not isinstance(job.prompt, str):
            raise ValueError(f"{job.name}: the prompt must be text")
        prompts.append(tokenizer.encode(job.prompt))
    return prompts


def make_params(workload: str, temperature: float, *, seed: int, scale: int) -> SamplingParams:
    """Return the settings of a workload."""
    max_tokens = max(4, _NEW_TOKENS[workload] // scale)
    more: dict[str, Any] = {"ignore_eos": True}
    if workload == "json":
        more = {"structured_outputs": StructuredOutputs(json=SCHEMA)}
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, **more)
