"""Compare every result of lm-eval over HTTP with `LLM` in this process.

Run: python examples/evaluate/compare.py --lm-eval /path/to/venv/bin/lm_eval

Starts `nanovllm serve` on a free port. lm-eval (`pip install 'lm-eval[api]' torch`, best in its own
virtual environment) runs the tasks in tasks/ on it: multiple choice (loglikelihood), texts, one of
them longer than the context (loglikelihood_rolling), and continuations (generate_until). Then `LLM`
scores the same tokens in this process. Nothing is downloaded. The last line is JSON. The exit code
is 1 if a log-likelihood differs by more than 1e-4, or if greediness or a generated text differs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanovllm import LLM, RequestOutput, SamplingParams

HERE = Path(__file__).resolve().parent
TASKS = ("rabbit_endings", "rabbit_text", "rabbit_next")
NAME = "evaluated"
TOLERANCE = 1e-4
VARIABLE = "NANOVLLM_LM_EVAL"


@dataclass(slots=True)
class Report:
    """What was compared, and how far the two were apart."""

    loglikelihoods: int = 0
    rolling: int = 0
    generations: int = 0
    greedy: int = 0
    largest_difference: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def number(self, place: str, theirs: float, ours: float) -> None:
        """Compare two log-likelihoods."""
        difference = abs(theirs - ours)
        self.largest_difference = max(self.largest_difference, difference)
        if not difference <= TOLERANCE:
            self.wrong.append(f"{place}: {theirs} by lm-eval, {ours} by LLM")

    def equal(self, place: str, theirs: object, ours: object) -> None:
        """Compare two things that must be the same."""
        if theirs != ours:
            self.wrong.append(f"{place}: {theirs!r} by lm-eval, {ours!r} by LLM")


class Scorer:
    """Log-likelihoods as lm-eval defines them, from the prompt log-probabilities of `LLM`."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.window = (
            llm.engine.max_model_len - 2
        )  # lm-eval's max_length less the token that it has generated, less one of context
        self.prefix = llm.engine.model.eos_token_ids[0]

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of `continuation` after `context`, and whether each of its tokens is a likeliest one."""
        spaces = len(context) - len(context.rstrip())  # belong to the word that follows
        begin = len(self._encode(context[: len(context) - spaces]))
        return self._score(self._encode(context + continuation), begin)

    def rolling(self, text: str) -> float:
        """Of a whole text after the end of another, in windows that fill the context."""
        tokens = [self.prefix, *self._encode(text)]
        total, done = 0.0, 1
        while done < len(tokens):
            end = min(len(tokens), done + self.window)
            begin = 0 if done == 1 else end - self.window - 1
            total += self._score(tokens[begin:end], done - begin)[0]
            done = end
        return total

    def generate(self, context: str, settings: dict[str, Any]) -> str:
        """The greedy answer."""
        params = SamplingParams(
            temperature=0, max_tokens=settings["max_gen_toks"], stop=settings["until"]
        )
        return self._run(self._encode(context), params).outputs[0].text

    def _run(self, tokens: list[int], params: SamplingParams) -> RequestOutput:
        (output,) = self.llm.generate([tokens], params, use_tqdm=False)
        if output.error is not None:
            raise RuntimeError(output.error)
        return output

    def _encode(self, text: str) -> list[int]:
        return self.llm.tokenizer.encode(text, add_special_tokens=False)

    def _score(self, tokens: list[int], begin: int) -> tuple[float, bool]:
        """Sum of the log-probabilities of the tokens from `begin` on; all of them greedy or not."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        positions = self._run(tokens, params).prompt_logprobs
        assert positions is not None
        total, is_greedy = 0.0, True
        for token, position in zip(tokens[begin:], positions[begin:], strict=True):
            assert position is not None
            total += position[token].logprob
            is_greedy &= position[token].logprob == max(
                other.logprob for other in position.values()
            )
        return total, is_greedy


@contextmanager
def serving(model: str) -> Iterator[str]:
    """A server of the model on a free port, as its address; ended at the end."""
    command = [
        sys.executable,
        "-m",
        "nanovllm.cli.main",
        "serve",
        model,
        "--served-model-name",
        NAME,
        "--port",
        "0",
        "--log-level",
        "warning",
    ]
    path = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        try:
            assert process.stdout is not None
            said = next((line for line in process.stdout if line.startswith("Serving on ")), None)
            if said is None:
                raise RuntimeError(
                    "the server has ended before it was ready; its messages are above"
                )
            yield said.split()[2]
        finally:
            process.terminate()


def evaluate(lm_eval: str, address: str, llm: LLM, output: Path) -> None:
    """Run the tasks, with requests and results in files under `output`.

    Raises RuntimeError if lm-eval fails.
    """
    prefix, context = llm.engine.model.eos_token_ids[0], llm.engine.max_model_len
    settings = (
        f"base_url={address}/v1/completions,model={NAME},tokenizer_backend=remote,"
        f"custom_prefix_token_id={prefix},max_length={context}"
    )
    command = [
        lm_eval,
        "run",
        "--model",
        "local-completions",
        "--model_args",
        settings,
        "--batch_size",
        "4",
        "--include_path",
        "tasks",
    ]
    command += ["--tasks", ",".join(TASKS), "--output_path", str(output), "--log_samples"]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(output / "cache"),
        "NO_PROXY": "127.0.0.1",
    }
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=HERE,
        env={**kept, **offline},
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"lm-eval has failed:\n{done.stdout[-3000:]}")
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("|")))


def samples(output: Path, task: str) -> Iterator[tuple[str, list[Any], Any]]:
    """Of each request of a task: where it is, its arguments and what lm-eval made of the answer."""
    (file,) = output.glob(f"*/samples_{task}_*.jsonl")
    for line in file.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        for number, (arguments, answers) in enumerate(
            zip(document["arguments"].values(), document["resps"], strict=True)
        ):
            yield f"{task} {document['doc_id']}.{number}", list(arguments.values()), answers[0]


def compare(output: Path, scorer: Scorer) -> Report:
    """Everything that lm-eval has measured beside what `LLM` says."""
    report = Report()
    for place, (context, continuation), (logprob, is_greedy) in samples(output, TASKS[0]):
        expected = scorer.loglikelihood(context, continuation)
        report.number(place, float(logprob), expected[0])
        report.equal(f"{place} is greedy", is_greedy == "True", expected[1])
        report.loglikelihoods += 1
        report.greedy += expected[1]
    for place, (text,), logprob in samples(output, TASKS[1]):
        report.number(place, float(logprob), scorer.rolling(text))
        report.rolling += 1
    for place, (context, settings), answer in samples(output, TASKS[2]):
        report.equal(place, answer, scorer.generate(context, settings))
        report.generations += 1
    return report


def run(model: str, lm_eval: str) -> Report:
    """Serve, evaluate, compare."""
    llm = LLM(model)
    with tempfile.TemporaryDirectory() as folder:
        with serving(model) as address:
            evaluate(lm_eval, address, llm, Path(folder))
        return compare(Path(folder), Scorer(llm))


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 0 where both agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-books", help="a folder or a name (%(default)s)")
    parser.add_argument(
        "--lm-eval",
        default=os.environ.get(VARIABLE) or shutil.which("lm_eval"),
        help=f"its program (${VARIABLE}, or from the path)",
    )
    parsed = parser.parse_args(arguments)
    if parsed.lm_eval is None:
        parser.error(
            "lm_eval is not on the path; install it (pip install 'lm-eval[api]' torch), or pass "
            f"its path by --lm-eval or {VARIABLE}"
        )
    report = run(parsed.model, parsed.lm_eval)
    for line in report.wrong:
        print(line)
    print(json.dumps(asdict(report)))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
