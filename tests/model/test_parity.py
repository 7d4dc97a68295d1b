"""Log-probabilities equal those of transformers, for every case of tests/reference/cases.py.

Recorded values are compared everywhere; where torch and transformers are installed, live ones too.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.backend import Backend, LoadOptions
from nanovllm.model.kernels.backend import NumbaBackend
from nanovllm.model.numpy_backend import NumpyBackend
from tests.reference.cases import (
    CASES,
    GREEDY_PROMPT,
    GREEDY_TOKENS,
    TOP_EVERY,
    options_of,
    prompts_of,
)
from tests.support.batches import make_batch
from tests.support.checkpoints import hash_folder, write_checkpoint, write_json

REFERENCE = Path(__file__).parent.parent / "reference"
FILES = ("recorded", "recorded_families")
TOLERANCE = 1e-4
CLEAR_GAP = 2e-4
BLOCK_SIZE = 32
BLOCKS = 40
Recorded = dict[str, dict[str, np.ndarray]]

SAME_AS_DEFAULT = {
    "activation-gelu_new",
    "activation-gelu_fast",
    "activation-gelu_pytorch_tanh",
    "activation-gelu_accurate",
}
"""Names of the same function as the default; the file's own are not settings."""


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    files = [json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8")) for name in FILES]
    return {"cases": {name: case for content in files for name, case in content["cases"].items()}}


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    cases: Recorded = {}
    for file in FILES:
        with np.load(REFERENCE / f"{file}.npz", allow_pickle=False) as arrays:
            for key in arrays.files:
                name, _, kind = key.partition("/")
                cases.setdefault(name, {})[kind] = arrays[key]
    return cases


KINDS = ["fast", "batch-invariant", "compiled"]
DECIDING_KINDS = ["fast", "compiled"]
"""Without the batch-invariant one: its values are the same in every step."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(folder: Path, *, kind: str = "fast") -> Backend:
    """The folder's network with a cache full of NaN: reading an unwritten slot shows."""
    backend: Backend = (
        NumbaBackend.load(folder)
        if kind == "compiled"
        else NumpyBackend.load(folder, LoadOptions(batch_invariant=kind == "batch-invariant"))
    )
    backend.allocate_cache(BLOCKS, BLOCK_SIZE)
    backend.fill_blocks(list(range(BLOCKS)), float("nan"))
    return backend


def our_logprobs(backend: Backend, *args: Any, **options: Any) -> np.ndarray:
    """Return the log-probabilities [rows, vocab] of a step, with the softmax in float64."""
    logits = backend.logits(backend.forward(make_batch(*args, block_size=BLOCK_SIZE, **options)))
    assert logits.dtype == np.float32
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logprobs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logprobs


def scattered_tables(lengths: list[int]) -> list[list[int]]:
    """Block tables with ids in random order."""
    ids = iter(np.random.default_rng(5).permutation(BLOCKS).tolist())
    return [[next(ids) for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]


def greedy(backend: Backend, prompt: np.ndarray, count: int) -> Iterator[int]:
    """The likeliest next tokens, each step computing one token over the cache."""
    tokens, computed = prompt.tolist(), 0
    for _ in range(count):
        best = int(our_logprobs(backend, [tokens], computed=[computed])[0].argmax())
        computed = len(tokens)
        tokens.append(best)
        yield best


def clear_steps(gaps: np.ndarray) -> int:
    """The number of steps before the first whose two best tokens are too close to decide."""
    close = gaps < CLEAR_GAP
    return int(close.argmax()) if close.any() else len(gaps)


def test_the_recorded_cases_are_the_cases(header: dict[str, Any], recorded: Recorded) -> None:
    assert list(header["cases"]) == list(recorded) == list(CASES)


def test_every_known_activation_is_recorded() -> None:
    assert {
        name.removeprefix("activation-") for name in CASES if name.startswith("activation-")
    } == set(ACTIVATIONS)


def test_the_recorded_models_are_lively(header: dict[str, Any]) -> None:
    for name, case in header["cases"].items():
        assert case["logprob_std"] > 1, name
        assert case["largest_hidden"] > 1000 or not CASES[name].get("outliers"), name


@pytest.mark.parametrize("name", CASES)
def test_the_checkpoint_is_the_recorded_one(
    tmp_path: Path, header: dict[str, Any], name: str
) -> None:
    assert (
        hash_folder(write_checkpoint(tmp_path, **options_of(name)))
        == header["cases"][name]["sha256"]
    ), "record the values again"


@pytest.mark.parametrize("name", CASES)
def test_logprobs_equal_the_recorded(
    tmp_path: Path, recorded: Recorded, name: str, kind: str
) -> None:
    backend = load(write_checkpoint(tmp_path, **options_of(name)), kind=kind)
    prompts = prompts_of(backend.config.vocab, backend.config.max_positions)
    ours = [our_logprobs(backend, [prompt], all_rows=True) for prompt in prompts]
    last = np.stack([values[-1] for values in ours])
    targets = np.concatenate(
        [
            values[np.arange(len(values) - 1), prompt[1:]]
            for values, prompt in zip(ours, prompts, strict=True)
        ]
    )
    top = np.take_along_axis(
        np.concatenate([values[::TOP_EVERY] for values in ours]),
        recorded[name]["top_ids"].astype(np.int64),
        axis=1,
    )
    np.testing.assert_allclose(last, recorded[name]["last"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(targets, recorded[name]["targets"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(top, recorded[name]["top_logprobs"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", DECIDING_KINDS, indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_prompts_in_one_batch_equal_the_recorded(
    tmp_path: Path, recorded: Recorded, name: str, kind: str
) -> None:
    backend = load(write_checkpoint(tmp_path, **options_of(name)), kind=kind)
    prompts = prompts_of(backend.config.vocab, backend.config.max_positions)
    ours = our_logprobs(
        backend, prompts, block_tables=scattered_tables([len(prompt) for prompt in prompts])
    )
    np.testing.assert_allclose(ours, recorded[name]["last"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", DECIDING_KINDS, indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_the_recorded(
    tmp_path: Path, recorded: Recorded, name: str, kind: str
) -> None:
    backend = load(write_checkpoint(tmp_path, **options_of(name)), kind=kind)
    prompt = prompts_of(backend.config.vocab)[GREEDY_PROMPT]
    ours = list(greedy(backend, prompt, GREEDY_TOKENS))
    clear = clear_steps(recorded[name]["greedy_gaps"])
    assert clear >= GREEDY_TOKENS // 2, "the reference hardly decides; give the case another seed"
    assert ours[:clear] == recorded[name]["greedy_ids"][:clear].tolist()


@pytest.mark.parametrize("name", ["plain", "head_dim-5", "scores-unscaled-by-layer", "outliers"])
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_prompts_in_chunks_equal_the_recorded(
    tmp_path: Path, recorded: Recorded, name: str, chunk: int, kind: str
) -> None:
    backend = load(write_checkpoint(tmp_path, **options_of(name)), kind=kind)
    prompt = prompts_of(backend.config.vocab)[-1]
    table = scattered_tables([len(prompt)])
    for start in range(0, len(prompt), chunk):
        ours = our_logprobs(
            backend, [prompt[: start + chunk]], computed=[start], block_tables=table
        )
    np.testing.assert_allclose(ours[0], recorded[name]["last"][-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [name for name, case in CASES.items() if "config" in case and name not in SAME_AS_DEFAULT],
)
def test_each_setting_changes_the_values(tmp_path: Path, name: str) -> None:
    """Otherwise its case would pass with the setting ignored."""
    default = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    folder = write_checkpoint(tmp_path, **options_of(name))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for setting in [setting for setting in CASES[name]["config"] if setting in default]:
        prompt = prompts_of(config["vocab_size"])[-1]
        right = our_logprobs(load(folder), [prompt], all_rows=True)
        write_json(folder / "config.json", {**config, setting: default[setting]})
        assert (
            np.abs(our_logprobs(load(folder), [prompt], all_rows=True) - right).max()
            > 10 * TOLERANCE
        ), setting
        write_json(folder / "config.json", config)


@pytest.fixture(scope="module")
def record() -> Any:
    return pytest.importorskip(
        "tests.reference.record",
        reason="needs torch and transformers; without them only the recorded values are compared",
    )


@pytest.mark.parametrize("name", CASES)
def test_values_equal_those_computed_live(tmp_path: Path, record: Any, name: str) -> None:
    """With other weights than those recorded."""
    folder = write_checkpoint(tmp_path, **{**options_of(name), "seed": 11})
    backend, reference = load(folder), record.load_reference(folder, record.torch.float32)
    prompts = prompts_of(backend.config.vocab, backend.config.max_positions)
    expected = [record.reference_logprobs(reference, prompt) for prompt in prompts]
    for prompt, logprobs in zip(prompts, expected, strict=True):
        np.testing.assert_allclose(
            our_logprobs(backend, [prompt], all_rows=True), logprobs, rtol=0, atol=TOLERANCE
        )
    together = our_logprobs(
        backend,
        prompts,
        block_tables=scattered_tables([len(prompt) for prompt in prompts]),
        all_rows=True,
    )
    np.testing.assert_allclose(together, np.concatenate(expected), rtol=0, atol=TOLERANCE)
    ids, gaps = record.reference_greedy(reference, prompts[GREEDY_PROMPT], GREEDY_TOKENS)
    clear = clear_steps(gaps)
    assert (
        list(greedy(backend, prompts[GREEDY_PROMPT], GREEDY_TOKENS))[:clear] == ids[:clear].tolist()
    )
