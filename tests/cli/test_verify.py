"""`nanovllm verify`: agreement with a right reference, every difference, and exit codes.

Most tests use NumPy's forward pass over unchunked prompts as the reference; the last ones use
transformers, if it is installed.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.cli.main import main
from nanovllm.cli.verify_comparison import Bound, Comparison
from nanovllm.cli.verify_reference import Libraries, Reference
from nanovllm.config import EngineConfig
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.llm import LLM
from nanovllm.model.numpy_backend import NumpyBackend
from tests.support.batches import make_batch
from tests.support.checkpoints import write_tiny_model

CONTEXT = 128
EXACT = Bound.of(EngineConfig(), None)


class FakeReference(Reference):
    """A fake reference; `shift` changes one log-probability, `wrong_step` one greedy token."""

    shift = 0.0
    wrong_step: int | None = None
    gap: float | None = None
    ids_shift = 0

    def __init__(self, folder: Path, libraries: Libraries) -> None:
        self.versions = {"a reference": "1.0"}
        self.tokenizer_problem = None
        self._ours = Tokenizer.load(folder)
        self._backend = NumpyBackend.load(folder)
        self._backend.allocate_cache(1, 256)

    def encode(self, text: str) -> list[int] | None:
        return [token_id + self.ids_shift for token_id in self._ours.encode(text)]

    def logprobs(self, token_ids: list[int], rows: int) -> Iterator[np.ndarray]:
        logprobs = self._all_logprobs(token_ids)
        logprobs[-1, 17] += self.shift
        yield from (logprobs[start : start + rows] for start in range(0, len(logprobs), rows))

    def greedy(self, token_ids: list[int], count: int) -> tuple[list[int], list[float]]:
        tokens, gaps = list(token_ids), []
        for step in range(count):
            last = self._all_logprobs(tokens)[-1]
            second, first = np.argsort(last)[-2:].tolist()
            is_wrong = step == self.wrong_step
            tokens.append(second if is_wrong else first)
            gaps.append(
                self.gap if is_wrong and self.gap is not None else float(last[first] - last[second])
            )
        return tokens[len(token_ids) :], gaps

    def _all_logprobs(self, token_ids: list[int]) -> np.ndarray:
        logits = self._backend.logits(
            self._backend.forward(make_batch([token_ids], block_size=256, all_rows=True))
        ).astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        logprobs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return logprobs


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> type[FakeReference]:
    """Verify against the fake, a new class for each test."""
    fake = type("Fake", (FakeReference,), {})
    monkeypatch.setattr("nanovllm.cli.verify_reference.Reference", fake)
    monkeypatch.setattr("nanovllm.cli.verify_reference.import_libraries", lambda: None)
    return fake


def run(
    capsys: pytest.CaptureFixture[str], *arguments: object, code: int
) -> tuple[dict[str, Any], str]:
    """Run `nanovllm verify`; give the JSON of its last line, and all that it printed."""
    assert main(["verify", *" ".join(map(str, arguments)).split()]) == code
    out = capsys.readouterr().out
    record: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert record["agrees"] == (code == 0)
    return record, out


def test_the_same_model_agrees(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    reference: type[FakeReference],
    backend: str,
) -> None:
    record, out = run(capsys, tiny_model, "--max-tokens", 8, "--backend", backend, code=0)
    assert "Agreement in all of 8 prompts" in out
    assert 0 < record["max_logprob_difference"] < 1e-5
    assert 0 < record["max_target_difference"] < 1e-5
    assert {prompt["prompt"]: prompt["tokens"] for prompt in record["prompts"]}[
        "long"
    ] == CONTEXT - 8
    assert all(
        prompt["is_tokenized_alike"] and prompt["greedy_equal"] == 8 for prompt in record["prompts"]
    )


def test_the_end_of_the_text_does_not_end_the_comparison(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, reference: type[FakeReference]
) -> None:
    write_tiny_model(tmp_path, config={"eos_token_id": list(range(267))})
    record, _ = run(capsys, tmp_path, "--max-tokens", 4, code=0)
    assert all(prompt["greedy_tokens"] == 4 for prompt in record["prompts"])


def test_settings_of_the_engine_are_those_that_are_verified(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    reference: type[FakeReference],
    backend: str,
) -> None:
    small = (
        f"--backend {backend} --block-size 4 --max-num-batched-tokens 8 --max-num-seqs 8 "
        "--batch-invariant --max-model-len 40"
    )
    record, _ = run(capsys, tiny_model, "--max-tokens", 8, small, code=0)
    assert max(prompt["tokens"] for prompt in record["prompts"]) == 32


def test_one_wrong_log_probability_is_found(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, reference: type[FakeReference]
) -> None:
    reference.shift = 1.5e-4
    record, out = run(capsys, tiny_model, "--max-tokens", 2, code=1)
    assert record["max_logprob_difference"] == pytest.approx(1.5e-4, rel=0.1)
    assert "DIFFERENT in 8 of 8 prompts" in out
    run(capsys, tiny_model, "--max-tokens", 2, "--tolerance", "2e-4", code=0)


@pytest.mark.parametrize("shift", [float("nan"), float("inf")])
def test_nan_differs(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    reference: type[FakeReference],
    shift: float,
) -> None:
    reference.shift = shift
    record, out = run(capsys, tiny_model, "--max-tokens", 2, code=1)
    assert record["max_logprob_difference"] is None
    assert "not finite" in out


def test_another_greedy_token_is_found(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, reference: type[FakeReference]
) -> None:
    reference.wrong_step = 3
    record, out = run(capsys, tiny_model, "--max-tokens", 6, code=1)
    assert all(prompt["greedy_equal"] == 3 for prompt in record["prompts"])
    assert "DIFFERENT at step 3" in out


def test_another_token_is_right_where_the_reference_hardly_decides(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, reference: type[FakeReference]
) -> None:
    reference.wrong_step, reference.gap = 3, 1.9e-4
    record, out = run(capsys, tiny_model, "--max-tokens", 6, code=0)
    assert all(
        (prompt["first_close_step"], prompt["gap_where_different"]) == (3, 1.9e-4)
        for prompt in record["prompts"]
    )
    assert "equal up to step 3, where the reference's two best are 1.9e-04 apart" in out
    run(capsys, tiny_model, "--max-tokens", 6, "--tolerance", "0.9e-4", code=1)


def test_another_tokenization_is_found(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, reference: type[FakeReference]
) -> None:
    reference.ids_shift = 1
    record, _ = run(capsys, tiny_model, "--max-tokens", 2, code=1)
    assert record["max_logprob_difference"] < 1e-5, "the same tokens are compared in any case"


def test_other_weights_are_found(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
    reference: type[FakeReference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tiny_model(tmp_path, scales={"h.1.mlp.c_proj.bias": 1.01})
    monkeypatch.setattr("nanovllm.llm.LLM", lambda folder, **settings: LLM(tmp_path, **settings))
    record, _ = run(capsys, tiny_model, "--max-tokens", 2, code=1)
    assert not any(prompt["agrees"] for prompt in record["prompts"])


def test_prompts_of_a_file(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
    reference: type[FakeReference],
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two  \n" + "x" * 200, encoding="utf-8")
    record, out = run(capsys, tiny_model, "--prompts", file, "--max-tokens", 2, code=0)
    compared = [
        (prompt["prompt"], prompt["tokens"], prompt["tokens_of_prompt"])
        for prompt in record["prompts"]
    ]
    assert [name for name, *_ in compared] == ["line 1", "line 3", "line 4"]
    assert compared[2] == ("line 4", CONTEXT - 2, 200)
    assert "126 of 200" in out


def test_an_impossible_comparison_exits_with_2(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
    reference: type[FakeReference],
) -> None:
    blank, binary = tmp_path / "blank.txt", tmp_path / "binary.txt"
    blank.write_text("\n \n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe")
    wrong: list[tuple[list[object], str]] = [
        ([tmp_path / "nothing"], "does not exist"),
        ([tiny_model, "--prompts", tmp_path / "nothing.txt"], "nothing.txt"),
        ([tiny_model, "--prompts", blank], "has no prompt"),
        ([tiny_model, "--prompts", binary], "is not text in UTF-8"),
        ([tiny_model, "--max-tokens", CONTEXT], "leaves no room for a prompt in a context of 128"),
        ([tiny_model, "--max-model-len", 1000], "max_model_len is 1000"),
    ]
    for arguments, message in wrong:
        assert main(["verify", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("nanovllm verify: ")
        assert message in err


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_transformers_it_says_how_to_install_them(tiny_model: Path, missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; "
        "from nanovllm.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "verify", str(tiny_model)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install transformers" in done.stderr
    assert "pip install torch --index-url https://download.pytorch.org/whl/cpu" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "exit codes: 0 " in capsys.readouterr().out


def test_the_conditions_of_agreement() -> None:
    good = Comparison(
        prompt="a", tokens=3, tokens_of_prompt=3, is_tokenized_alike=True,
        logprob_difference=1e-4, target_difference=1e-4, greedy_tokens=8, greedy_equal=8,
        first_close_step=None, gap_where_different=None,
    )  # fmt: skip
    assert good.agrees(EXACT)
    assert replace(good, is_tokenized_alike=None).agrees(EXACT), "there was nothing to compare with"
    assert replace(good, greedy_equal=5, first_close_step=5).agrees(EXACT)
    assert replace(good, greedy_equal=6, first_close_step=5).agrees(EXACT)
    assert not replace(good, greedy_equal=4, first_close_step=5).agrees(EXACT)
    assert not replace(good, greedy_equal=7).agrees(EXACT)
    for change in (
        {"is_tokenized_alike": False},
        {"logprob_difference": 1.1e-4},
        {"target_difference": 1.1e-4},
        {"logprob_difference": None},
    ):
        assert not replace(good, **change).agrees(EXACT)


def test_rounded_weights_are_judged_by_the_divergence() -> None:
    int8 = Bound.of(EngineConfig(quantization="int8"), None)
    bfloat16 = Bound.of(EngineConfig(kv_cache_dtype="bfloat16"), None)
    assert int8.divergence is not None
    assert bfloat16.divergence is not None
    assert bfloat16.divergence < int8.divergence
    assert Bound(1e-4, None, 2e-4) == EXACT
    assert Bound.of(EngineConfig(quantization="int8"), 0.1) == Bound(0.1, None, 0.2)
    comparison = Comparison(
        prompt="a", tokens=3, tokens_of_prompt=3, is_tokenized_alike=True,
        logprob_difference=0.4, target_difference=0.2, greedy_tokens=8, greedy_equal=8,
        first_close_step=None, gap_where_different=None, divergence=3e-4,
    )  # fmt: skip
    assert comparison.agrees(int8)
    assert not comparison.agrees(EXACT)
    for change in ({"divergence": 6e-3}, {"divergence": None}, {"target_difference": 2.0}):
        assert not replace(comparison, **change).agrees(int8)


def test_the_divergence_of_another_model_is_found(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, reference: type[FakeReference]
) -> None:
    record, _ = run(capsys, tiny_model, "--max-tokens", 2, "--backend", "numpy", code=0)
    assert all(abs(prompt["divergence"]) < 1e-5 for prompt in record["prompts"])
    reference.shift = 8.0
    record, _ = run(capsys, tiny_model, "--max-tokens", 2, "--backend", "numpy", code=1)
    assert all(prompt["divergence"] > 1e-4 for prompt in record["prompts"])


@pytest.fixture
def transformers() -> None:
    """Skips where torch or transformers is missing; their warnings are not ours."""
    for name in ("torch", "transformers"):
        pytest.importorskip(
            name, reason="compares with the real reference, which few install", exc_type=ImportError
        )


FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16, no prefix": {"dtype": "F16", "prefix": False},
    "bfloat16 in shards": {"dtype": "BF16", "shards": 3},
    "vocab.json and merges.txt": {"tokenizer": "vocab.json"},
    "untied, buffers, outliers": {
        "tied": False,
        "buffers": True,
        "outliers": True,
        "config": {"n_embd": 64},
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_checkpoint_agrees_with_transformers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, form: str
) -> None:
    record, _ = run(capsys, write_tiny_model(tmp_path, **FORMS[form]), "--max-tokens", 12, code=0)
    assert 0 < record["max_logprob_difference"] < 1e-4
    assert set(record["versions"]) == {"transformers", "torch"}
    assert record["tokenizer_problem"] is None
    assert all(prompt["is_tokenized_alike"] for prompt in record["prompts"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("transformers")
def test_other_weights_than_those_of_transformers_are_found(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tiny_model(tmp_path, scales={"h.0.attn.c_attn.bias": 1.01})
    monkeypatch.setattr("nanovllm.llm.LLM", lambda folder, **settings: LLM(tmp_path, **settings))
    record, _ = run(capsys, tiny_model, "--max-tokens", 2, code=1)
    assert record["max_logprob_difference"] > 1e-4
