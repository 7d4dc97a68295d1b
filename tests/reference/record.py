"""Record what transformers computes for the cases of cases.py, for machines that lack it.

    PYTHONPATH=. python tests/reference/record.py

needs torch and transformers, and writes recorded.npz and recorded.json beside this file. Each model
is computed in float32 with eager attention, and once more in float64. A case whose two results
differ by more than a quarter of our tolerance is refused. It would test the reference's rounding
and not ours.
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from tokenizers import Tokenizer

from nanovllm.hub.names import bundled_folder
from tests.reference.cases import (
    FAMILY_CASES,
    GPT2_CASES,
    GREEDY_PROMPT,
    GREEDY_TOKENS,
    TOP_EVERY,
    options_of,
    prompts_of,
)
from tests.support.checkpoints import hash_folder, write_checkpoint

FOLDER = Path(__file__).parent
TOP = 8
NOISE_LIMIT = 2.5e-5
PASSAGE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the "
    "season of Light, it was the season of Darkness, it was the spring of hope, it was the winter "
    "of despair."
)


def load_reference(folder: Path, dtype: torch.dtype) -> Any:
    """The folder's model in `dtype`, whatever its file holds."""
    options = {}
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    if kind == "gpt2" and dtype != torch.float32:
        options["reorder_and_upcast_attn"] = False  # the same function, which insists on float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", **options
    )
    return model.eval()


def reference_logprobs(model: Any, token_ids: np.ndarray) -> np.ndarray:
    """Return log-probabilities [tokens, vocab] without a cache, with the softmax in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(token_ids)[None], use_cache=False).logits[0]
    logprobs: np.ndarray = torch.log_softmax(logits.double(), dim=-1).numpy()
    return logprobs


def reference_greedy(
    model: Any, token_ids: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` greedy tokens, and how far each log-probability exceeds the next best one."""
    tokens, gaps = list(token_ids), []
    for _ in range(count):
        logprobs = reference_logprobs(model, np.asarray(tokens, dtype=np.int64))[-1]
        second, first = np.sort(logprobs)[-2:]
        tokens.append(int(logprobs.argmax()))
        gaps.append(first - second)
    return np.asarray(tokens[len(token_ids) :], dtype=np.int16), np.asarray(gaps, dtype=np.float32)


def record_case(name: str, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One case's arrays, and what the header says about it."""
    write_checkpoint(folder, **options_of(name))
    model, exact = load_reference(folder, torch.float32), load_reference(folder, torch.float64)
    prompts = prompts_of(model.config.vocab_size, model.config.max_position_embeddings)
    logprobs = [reference_logprobs(model, prompt) for prompt in prompts]
    noise = max(
        float(np.abs(reference_logprobs(exact, prompt) - ours).max())
        for prompt, ours in zip(prompts, logprobs, strict=True)
    )
    if noise > NOISE_LIMIT:
        raise SystemExit(
            f"{name}: the reference's own rounding is {noise:.1e}, above {NOISE_LIMIT:.1e}; "
            "make the case better conditioned"
        )
    sampled = np.concatenate([values[::TOP_EVERY] for values in logprobs])
    top_ids = np.argsort(-sampled, axis=1, kind="stable")[:, :TOP]
    greedy_ids, greedy_gaps = reference_greedy(model, prompts[GREEDY_PROMPT], GREEDY_TOKENS)
    arrays: dict[str, np.ndarray] = {
        "last": np.stack([values[-1] for values in logprobs]).astype(np.float32),
        "targets": np.concatenate(
            [
                values[np.arange(len(values) - 1), prompt[1:]]
                for values, prompt in zip(logprobs, prompts, strict=True)
            ]
        ).astype(np.float32),
        "top_ids": top_ids.astype(np.int16),
        "top_logprobs": np.take_along_axis(sampled, top_ids, axis=1).astype(np.float32),
        "greedy_ids": greedy_ids,
        "greedy_gaps": greedy_gaps,
    }
    return arrays, {
        "noise": float(f"{noise:.1e}"),
        **describe(model, prompts, logprobs),
        "sha256": hash_folder(folder),
    }


def describe(model: Any, prompts: list[np.ndarray], logprobs: list[np.ndarray]) -> dict[str, float]:
    """Return the spread of a case's log-probabilities, and its residual stream's largest number."""
    with torch.no_grad():
        hidden = model(
            input_ids=torch.from_numpy(prompts[-1])[None], output_hidden_states=True
        ).hidden_states
    largest = max(float(layer.abs().max()) for layer in hidden[:-1])
    return {"logprob_std": round(float(logprobs[-1].std()), 2), "largest_hidden": round(largest, 1)}


def record_loss() -> None:
    """Record the training loss of the bundled model on a passage."""
    folder = bundled_folder()
    model = load_reference(folder, torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_ids = tokenizer.encode(PASSAGE, add_special_tokens=False).ids
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    content = {"token_ids": token_ids, "loss": loss}
    (FOLDER / "recorded_loss.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def record_cases(names: Iterable[str], file_name: str) -> None:
    """Record cases into a .npz and a .json file of that name."""
    arrays: dict[str, np.ndarray] = {}
    cases: dict[str, dict[str, Any]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            recorded, cases[name] = record_case(name, Path(folder))
        arrays.update({f"{name}/{key}": value for key, value in recorded.items()})
        print(name, cases[name], flush=True)
    versions = {
        module.__name__: module.__version__ for module in (transformers, torch, np, safetensors)
    }
    np.savez_compressed(FOLDER / f"{file_name}.npz", allow_pickle=False, **arrays)
    header = {
        "versions": versions,
        "computed_in": "float32, eager attention, no cache",
        "cases": cases,
    }
    path = FOLDER / f"{file_name}.json"
    path.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Record everything, or only what the arguments name: "loss", "gpt2", "families"."""
    parts = sys.argv[1:] or ["loss", "gpt2", "families"]
    if "loss" in parts:
        record_loss()
    if "gpt2" in parts:
        record_cases(GPT2_CASES, "recorded")
    if "families" in parts:
        record_cases(FAMILY_CASES, "recorded_families")


if __name__ == "__main__":
    main()
