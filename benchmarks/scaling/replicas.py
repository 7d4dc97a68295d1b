"""Compare two replicas of one thread under Ray Serve with one server of two threads.

Run: python -m benchmarks.scaling.replicas --json replicas.json     (needs the extra ray)
     python benchmarks/table.py replicas.json --write docs/maintainers/measurements.md

`nanovllm bench serve` measures each deployment with 1, 32 and 128 clients, in rounds; nothing else
runs meanwhile. A server of one thread is measured with 1 client: what it lacks against a replica of
one thread is the cost of Ray's proxy and of the ingress. The same prompts, greedy and sampled, are
sent to all of them, and the answers must be equal to the bit of every logprob.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.options import finish, new_parser, tell
from benchmarks.scaling.deployments import Deployment, deploy, one_server, ray_cluster
from nanovllm.cli.argument_types import positive
from nanovllm.config import BUNDLED_MODEL

SERVER, SMALL_SERVER, REPLICAS = "one server, 2 threads", "one server, 1 thread", "2 replicas"
_FIGURES = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
_REQUESTS_PER_CLIENT = {1: 12, 32: 3, 128: 2}
_CLASSES = {"float32": [], "int8": ["--quantization", "int8"]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "rounds")
    parser.add_argument("--model", default=BUNDLED_MODEL, help="folder or name (%(default)s)")
    parser.add_argument(
        "--clients", type=positive, nargs="+", default=[1, 32, 128], help="numbers (1 32 128)"
    )
    parser.add_argument(
        "--classes", nargs="+", default=list(_CLASSES), choices=_CLASSES, help="of the weights"
    )
    parser.add_argument("--input-tokens", type=positive, default=128, help="(%(default)s)")
    parser.add_argument("--output-tokens", type=positive, default=64, help="(%(default)s)")
    parser.add_argument("options", nargs="*", help="options of `nanovllm serve`, after --")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; return 1 if the answers differ."""
    parsed = parse(arguments)
    record: dict[str, Any] = {
        "benchmark": "replicas", "model": Path(parsed.model).name, "rounds": parsed.rounds,
        "input_tokens": parsed.input_tokens, "output_tokens": parsed.output_tokens,
        "classes": {}, "equal_answers": True,
    }  # fmt: skip
    for name in parsed.classes:
        runs, answers = measure(parsed, [*_CLASSES[name], *parsed.options])
        record["classes"][name] = summary(runs)
        record["equal_answers"] &= all(answer == answers[0] for answer in answers)
    print(f"answers equal: {record['equal_answers']}")
    finish(record, parsed)
    return 0 if record["equal_answers"] else 1


Runs = dict[str, dict[str, list[dict[str, float]]]]


def measure(parsed: argparse.Namespace, options: Sequence[str]) -> tuple[Runs, list[Any]]:
    """Return the figures of all rounds by deployment and clients, and the answers of each turn."""
    runs: Runs = {}
    answers = []
    names = [SERVER, REPLICAS, SMALL_SERVER]
    for number in range(parsed.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            tell(f"round {number + 1} of {parsed.rounds}: {name}")
            with running(name, parsed.model, options) as deployment:
                answers.append(sample_answers(deployment))
                for clients in [1] if name == SMALL_SERVER else parsed.clients:
                    figures = bench(deployment, clients, parsed)
                    runs.setdefault(name, {}).setdefault(str(clients), []).append(figures)
                    tell(f"  {clients} clients: {figures['output_throughput']:.0f} tokens/s, "
                         f"TTFT {figures['median_ttft_ms']:.0f} ms")  # fmt: skip
    return runs, answers


@contextlib.contextmanager
def running(name: str, model: str, options: Sequence[str]) -> Iterator[Deployment]:
    """Run one of the deployments."""
    if name != REPLICAS:
        with one_server(model, 2 if name == SERVER else 1, options) as deployment:
            yield deployment
        return
    names = [option.removeprefix("--") for option in options[::2]]
    settings = {
        "model": model, "replicas": 2, "num_threads": 1, "max_ongoing_requests": 128,
        "max_queued_requests": 1024, "options": dict(zip(names, options[1::2], strict=True)),
    }  # fmt: skip
    with ray_cluster(2) as port:
        yield deploy(port, {"models": [settings]})


def bench(deployment: Deployment, clients: int, parsed: argparse.Namespace) -> dict[str, float]:
    """Return the figures of `nanovllm bench serve`; raises RuntimeError if a request failed."""
    num_prompts = clients * _REQUESTS_PER_CLIENT.get(clients, 3)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable, "-m", "nanovllm", "bench", "serve", "--base-url", deployment.url,
            "--num-prompts", str(num_prompts), "--max-concurrency", str(clients),
            "--random-input-len", str(parsed.input_tokens),
            "--random-output-len", str(parsed.output_tokens), "--ignore-eos",
            "--json", str(report),
        ]  # fmt: skip
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        figures = json.loads(report.read_text(encoding="utf-8"))
    return {name: float(figures[name]) for name in _FIGURES}


def sample_answers(deployment: Deployment) -> list[Any]:
    """Return the choices, with logprobs, of 16 concurrent requests: greedy and sampled."""
    bodies = [
        {
            "prompt": [(7 * number + position) % 250 for position in range(8 + 5 * number)],
            "max_tokens": 24,
            "temperature": 0.0 if number % 2 else 0.9,
            "top_p": 0.95,
            "seed": number,
            "logprobs": 3,
        }
        for number in range(16)
    ]

    def choices(body: dict[str, Any]) -> Any:
        status, content = deployment.ask("/v1/completions", body)
        if status != 200:
            raise RuntimeError(f"{body} was answered with {status}: {content[:500]!r}")
        return json.loads(content)["choices"]

    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(choices, bodies))


def summary(runs: Runs) -> dict[str, Any]:
    """Return the medians of all rounds, and the ratios of throughput to one server's."""
    medians = {
        name: {
            clients: {figure: statistics.median(one[figure] for one in all_) for figure in _FIGURES}
            for clients, all_ in by_clients.items()
        }
        for name, by_clients in runs.items()
    }
    ratios = {
        clients: statistics.median(
            ours["output_throughput"] / base["output_throughput"]
            for ours, base in zip(runs[REPLICAS][clients], runs[SERVER][clients], strict=True)
        )
        for clients in runs[SERVER]
    }
    overhead = {}
    if "1" in runs[REPLICAS]:
        pairs = list(zip(runs[REPLICAS]["1"], runs[SMALL_SERVER]["1"], strict=True))
        overhead = {
            name: statistics.median(ours[name] - base[name] for ours, base in pairs)
            for name in ("median_ttft_ms", "median_tpot_ms")
        }
    return {"deployments": medians, "ratios": ratios, "overhead_ms": overhead}


if __name__ == "__main__":
    sys.exit(main())
