"""examples/evaluate: lm-eval against a real server, where it is installed, and the comparison."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from examples.evaluate import compare
from nanovllm import LLM
from tests.support.serving import ENGINE_SETTINGS

TEXT = "the end " * 60
SETTINGS = {"until": ["W"], "max_gen_toks": 5}
LM_EVAL = os.environ.get(compare.VARIABLE) or shutil.which("lm_eval")


@pytest.mark.slow(60)
@pytest.mark.skipif(
    LM_EVAL is None,
    reason=(
        f"needs lm-eval: pip install 'lm-eval[api]' torch, and set {compare.VARIABLE} to the path "
        "of lm_eval"
    ),
)
def test_lm_eval_measures_what_llm_says() -> None:
    assert LM_EVAL is not None
    report = compare.run("tiny-books", LM_EVAL)
    assert report.wrong == []
    assert report.largest_difference <= compare.TOLERANCE
    assert (report.loglikelihoods, report.rolling, report.generations) == (72, 7, 6)
    assert 0 < report.greedy < report.loglikelihoods


@pytest.fixture(scope="module")
def scorer(tiny_model: Path) -> compare.Scorer:
    return compare.Scorer(LLM(tiny_model, **ENGINE_SETTINGS))


@pytest.fixture(scope="module")
def results(scorer: compare.Scorer) -> dict[str, Any]:
    """The results of `LLM`."""
    logprob, is_greedy = scorer.loglikelihood("in the ", "end")
    return {
        "choice": logprob,
        "greedy": is_greedy,
        "text": scorer.rolling(TEXT),
        "answer": scorer.generate("the", SETTINGS),
    }


def write_samples(folder: Path, results: dict[str, Any]) -> Path:
    """Write results to files as lm-eval does."""
    documents: dict[str, tuple[list[Any], list[Any]]] = {
        "rabbit_endings": (["in the ", "end"], [[str(results["choice"]), str(results["greedy"])]]),
        "rabbit_text": ([TEXT], [str(results["text"])]),
        "rabbit_next": (["the", SETTINGS], [results["answer"]]),
    }
    for task, (arguments, answers) in documents.items():
        line = {
            "doc_id": 0,
            "arguments": {"gen_args_0": {f"arg_{i}": value for i, value in enumerate(arguments)}},
            "resps": [answers],
        }
        file = folder / "model" / f"samples_{task}_2026.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(line) + "\n", encoding="utf-8")
    return folder


def test_equal_results_have_no_differences(
    scorer: compare.Scorer, results: dict[str, Any], tmp_path: Path
) -> None:
    report = compare.compare(write_samples(tmp_path, results), scorer)
    assert report.wrong == []
    assert (
        report.loglikelihoods,
        report.rolling,
        report.generations,
        report.largest_difference,
    ) == (1, 1, 1, 0.0)


DIFFERENCES: dict[str, dict[str, Any]] = {
    "rabbit_endings 0.0: -3.0 by": {"choice": -3.0},
    "rabbit_endings 0.0: nan by": {"choice": float("nan")},
    "rabbit_endings 0.0 is greedy: True by": {"greedy": True},
    "rabbit_text 0.0: 0.001 by": {"text": 1e-3},
    "rabbit_next 0.0: '?' by": {"answer": "?"},
}


@pytest.mark.parametrize("message", DIFFERENCES)
def test_differences_are_reported(
    scorer: compare.Scorer, results: dict[str, Any], tmp_path: Path, message: str
) -> None:
    changed = write_samples(tmp_path, {**results, **DIFFERENCES[message]})
    (wrong,) = compare.compare(changed, scorer).wrong
    assert wrong.startswith(message)


def test_windows_cover_a_text_once(scorer: compare.Scorer) -> None:
    """Each token is scored once. A short text has one window."""
    tokens = [scorer.prefix, *scorer.llm.tokenizer.encode(TEXT)]
    window = scorer.window
    assert len(tokens) > 2 * window
    parts, done = 0.0, 1
    for end in range(window + 1, len(tokens), window):
        begin = end - window - 1
        parts += scorer._score(tokens[begin:end], done - begin)[0]  # noqa: SLF001
        done = end
    rest = tokens[len(tokens) - window - 1 :]
    parts += scorer._score(rest, len(rest) - (len(tokens) - done))[0]  # noqa: SLF001
    assert scorer.rolling(TEXT) == pytest.approx(parts, abs=1e-9)
    short = scorer.llm.tokenizer.encode("the end")
    assert scorer.rolling("the end") == scorer._score([scorer.prefix, *short], 1)[0]  # noqa: SLF001
