"""Measure speculative decoding on trained checkpoints: decode tokens per second against no drafts.

Run: python benchmarks/speculation.py --classes float32,bfloat16,int8 --json speculation.json

The bundled models are made several times as wide by benchmarks/widen.py, so that the text is that
of trained models and the cost that of larger ones. Each type of weights and each method has an
engine of its own. It runs each workload with and without drafts, by turns within a round, greedily
and at temperature 0.8. Before the rounds, tokens and log-probabilities must be equal to the last
bit; in each round, all tokens. The time begins when the last prompt is computed. The last line of
the report is JSON.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OUR_OPTIONS
from benchmarks.options import finish, in_turns, new_parser, spread, tell
from benchmarks.speculation_work import (
    PAIRS,
    WORKLOADS,
    Pair,
    Prompts,
    choose_prompts,
    make_pairs,
    make_params,
    make_prompts,
    pair_of,
)
from nanovllm.cli.argument_types import names_of, positive
from nanovllm.cli.bench.drafts import Drafts
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.outputs import CompletionOutput
from nanovllm.progress import progress_bar
from nanovllm.sampling_params import SamplingParams

METHODS = ("ngram", "draft", "both")
TEMPERATURES = (0.0, 0.8)
_MOST_STREAMS = {"prose": 1 << 10}
_MOST_STREAMS_ELSEWHERE = 4
MAX_BATCHED_TOKENS = 2048  # all prompts in one step


@dataclass(frozen=True, slots=True)
class Case:
    """One workload with a number of streams and a temperature, on the engine of a method."""

    type: str
    method: str
    workload: str
    streams: int
    temperature: float

    @property
    def pair(self) -> str:
        """Return the name of its models."""
        return pair_of(self.workload)

    def __str__(self) -> str:
        kind = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"{self.type}, {self.method}, {self.workload}, {self.streams} at once, {kind}"


@dataclass(frozen=True, slots=True)
class Turn:
    """The decode phase of one run: its tokens, time, drafted and accepted tokens."""

    tokens: int
    seconds: float
    drafted: int
    accepted: int

    @property
    def tokens_per_s(self) -> float:
        """Return decoded tokens per second."""
        return self.tokens / self.seconds


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "scale", "ours", "classes", "rounds", rounds=5)
    return parse_options(
        parser, arguments, workloads=WORKLOADS, methods=METHODS, streams=[1, 4, 32]
    )


def parse_options(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    *,
    workloads: Sequence[str],
    methods: Sequence[str],
    streams: list[int],
) -> argparse.Namespace:
    """Add the options of the models and cases to a parser, and parse the command line.

    `workloads`, `methods` and `streams` are the defaults.
    """
    _add_models(parser)
    for name, known in (("workloads", workloads), ("methods", methods)):
        parser.add_argument(
            f"--{name}",
            type=names_of(known),
            default=",".join(known),
            help=f"some of the {name} (%(default)s)",
        )
    parser.add_argument(
        "--streams",
        type=_numbers,
        default=streams,
        help=f"requests at once; above 4 in prose only ({','.join(map(str, streams))})",
    )
    parsed = parser.parse_args(arguments)
    if len(parsed.factors) != 2:
        parser.error("--factors takes two numbers, such as 4,5")
    missing = _missing(parsed)
    for name in missing:
        tell(f"{name} is skipped: {missing[name]}")
    parsed.workloads = [name for name in parsed.workloads if name not in missing]
    if not parsed.workloads:
        parser.error("no workload is left")
    return parsed


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="tiny-books", help="trained model, by folder or name (%(default)s)"
    )
    parser.add_argument(
        "--draft-model", default="tiny-books-draft", help="its draft model (%(default)s)"
    )
    parser.add_argument(
        "--factors",
        type=_numbers,
        default=[4, 5],
        help="width of the model and of the draft model in that of the originals (4,5)",
    )
    parser.add_argument(
        "--models", type=Path, default=None, metavar="DIR", help="folder that keeps the wide models"
    )
    parser.add_argument(
        "--repeats-model",
        default=None,
        metavar="MODEL",
        help="model that copies text of its prompt, which repeats needs",
    )
    parser.add_argument(
        "--repeats-prompts",
        type=Path,
        default=None,
        metavar="FILE",
        help="its prompts, as JSON Lines with a prompt each (passages that begin again)",
    )


def _missing(parsed: argparse.Namespace) -> dict[str, str]:
    """Return why workloads cannot run."""
    reasons = {}
    if parsed.repeats_model is None:
        reasons["repeats"] = "it needs --repeats-model"
    if find_spec("llguidance") is None:
        reasons["json"] = "it needs llguidance"
    return {name: reason for name, reason in reasons.items() if name in parsed.workloads}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = parse(arguments)
    with models_of(parsed) as pairs:
        record = {
            "benchmark": "speculation",
            "rounds": parsed.rounds,
            "factors": parsed.factors,
            "models": {name: pair.record() for name, pair in pairs.items()},
            "results": list(_measure_all(pairs, parsed)),
        }
    finish(record, parsed)
    return 0


@contextmanager
def models_of(parsed: argparse.Namespace) -> Iterator[dict[str, Pair]]:
    """Make the models of the workloads, and remove them after use unless --models keeps them."""
    sources = {
        pair_of(name): parsed.repeats_model if name == "repeats" else parsed.model
        for name in parsed.workloads
    }
    keeps = parsed.models is not None
    with nullcontext(parsed.models) if keeps else tempfile.TemporaryDirectory() as folder:
        yield make_pairs(
            sources, tuple(parsed.factors), parsed.draft_model, Path(folder), seed=parsed.seed
        )


def _measure_all(pairs: dict[str, Pair], parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every case, and print each when it is done."""
    cases = [
        Case(kind, method, workload, streams, temperature)
        for kind in parsed.classes
        for method in parsed.methods
        for workload in sorted(parsed.workloads, key=lambda name: PAIRS.index(pair_of(name)))
        for streams in parsed.streams
        if streams <= _MOST_STREAMS.get(workload, _MOST_STREAMS_ELSEWHERE)
        for temperature in TEMPERATURES
    ]
    with progress_bar(total=len(cases), desc="Cases", unit="case") as progress:
        for (_, _, name), group in groupby(cases, lambda case: (case.type, case.method, case.pair)):
            for case, result in _measure_group(list(group), pairs[name], parsed):
                progress.write(_line(case, result))
                progress.update()
                yield result


def _measure_group(
    cases: Sequence[Case], pair: Pair, parsed: argparse.Namespace
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Measure the cases of one engine, which is freed at the end."""
    with closing(load(cases[0], pair, parsed)) as engine:
        for case in cases:
            yield case, measure(engine, case, parsed)


def load(case: Case, pair: Pair, parsed: argparse.Namespace) -> Engine:
    """Load the engine of a case."""
    more = {"max_num_seqs": max(parsed.streams), **parsed.ours}
    return load_pair(pair, case.type, case.method, parsed.threads, more)


def load_pair(
    pair: Pair, kind: str, method: str, threads: int | None, more: Mapping[str, Any]
) -> Engine:
    """Load an engine that drafts by a method, or "none"; `more` are settings of an engine."""
    methods: dict[str, dict[str, Any] | None] = {
        "none": None,
        "ngram": {"method": "ngram"},
        "draft": {"model": str(pair.draft)},
        "both": {"model": str(pair.draft), "method": "ngram"},
    }
    settings = {
        "num_threads": threads,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "speculative_config": methods[method],
        **OUR_OPTIONS[kind],
        **more,
        "enable_prefix_caching": False,  # else one run's text in the cache drafts the next run's
    }
    return Engine.load(pair.target, EngineConfig(**settings))


def measure(engine: Engine, case: Case, parsed: argparse.Namespace) -> dict[str, Any]:
    """Run a case with and without drafts; raise RuntimeError if the outputs differ."""
    prompts = make_prompts(
        case.workload,
        engine.tokenizer,
        seed=parsed.seed,
        scale=parsed.scale,
        file=parsed.repeats_prompts,
    )

    def turn(number: int, *, drafts: bool, **more: Any) -> tuple[Turn, list[Any]]:
        chosen = choose_prompts(prompts, case.streams, number)
        params = make_params(
            case.workload, case.temperature, seed=parsed.seed + number, scale=parsed.scale
        )
        return run(engine, chosen, params.clone(speculative=drafts, **more))

    def compare(outputs: dict[bool, list[Any]]) -> None:
        if outputs[True] != outputs[False]:
            raise RuntimeError(f"{case}: the output with drafts differs from that without")

    compare({drafts: turn(0, drafts=drafts, logprobs=0)[1] for drafts in (False, True)})
    rounds: list[dict[bool, Turn]] = []
    for number, ordered in in_turns((False, True), parsed.rounds):
        turns = {drafts: turn(number, drafts=drafts) for drafts in ordered}
        compare({drafts: outputs for drafts, (_, outputs) in turns.items()})
        rounds.append({drafts: one for drafts, (one, _) in turns.items()})
    return {**asdict(case), **figures_of(rounds)}


def run(
    engine: Engine, prompts: Prompts, params: SamplingParams
) -> tuple[Turn, list[tuple[list[int], Any]]]:
    """Run prompts at once; return the decode phase, and their tokens and log-probabilities.

    The decode phase follows the last step that computes prompt tokens. It is measured by the clock,
    so that it includes what happens between steps, such as waiting for the mask of a grammar.
    """
    processed = engine.input_processor.process(
        GenerationRequest(prompts=prompts, params=params, request_id="speculation", must_fit=True)
    )
    tokens, started_s, before = 0, time.perf_counter(), Drafts.of_engine(engine.stats())
    for step in engine.run(processed):
        tokens += step.stats.num_decode_tokens
        if step.stats.num_prompt_tokens:
            tokens, started_s, before = 0, time.perf_counter(), Drafts.of_engine(engine.stats())
    seconds = time.perf_counter() - started_s
    drafts = Drafts.of_engine(engine.stats()).since(before)
    if engine.stats().num_preemptions:
        raise RuntimeError("the KV cache is too small; give --ours a larger kv_cache_memory")
    for prompt in processed:
        if prompt.error is not None:
            raise prompt.error
    answers: list[CompletionOutput] = [prompt.output().outputs[0] for prompt in processed]
    outputs = [
        (answer.token_ids, None if answer.logprobs is None else list(answer.logprobs))
        for answer in answers
    ]
    return Turn(tokens, seconds, drafts.drafted, drafts.accepted), outputs


def figures_of(rounds: Sequence[dict[bool, Turn]]) -> dict[str, Any]:
    """Return the figures of a case: ratios within rounds, speeds, and drafts of all rounds.

    Each round has the turns with drafts (True) and without (False).
    """
    return {
        "ratio": spread([one[True].tokens_per_s / one[False].tokens_per_s for one in rounds]),
        "tokens_per_s": statistics.median(one[True].tokens_per_s for one in rounds),
        "plain_tokens_per_s": statistics.median(one[False].tokens_per_s for one in rounds),
        "drafted": sum(one[True].drafted for one in rounds),
        "accepted": sum(one[True].accepted for one in rounds),
        "rounds": [{"drafts": asdict(one[True]), "plain": asdict(one[False])} for one in rounds],
    }


def _line(case: Case, result: dict[str, Any]) -> str:
    speeds = f"{result['plain_tokens_per_s']:,.1f} to {result['tokens_per_s']:,.1f} tokens/s"
    accepted = f"{result['accepted']:,} of {result['drafted']:,} drafted tokens accepted"
    return f"{case}: {result['ratio']['median']:.2f} ({speeds}), {accepted}"


def _numbers(text: str) -> list[int]:
    """Parse integers of at least 1 with commas between them."""
    return [positive(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
